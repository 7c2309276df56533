"""Several processes as one run: how they find each other, and how they meet.

A TPU pod slice, Slurm, Kubernetes and MPI tell each process about the others by environment variables; `start` sees
that there are others, and `jax.distributed.initialize` finds them. Elsewhere, flags of the command line tell.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

# Neither is public: what tells that this is a TPU host before its devices are opened, and the coordination service,
# the only place of a meeting that ends when someone does not come.
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.distributed import global_state
from jax.experimental.multihost_utils import process_allgather

from xattn.config import UsageError

Environment = Mapping[str, str]

_meetings = itertools.count()  # no barrier can be used twice


def _more_than_one(variable: str) -> Callable[[Environment], bool]:
    return lambda environment: environment.get(variable, "1") not in ("", "0", "1")


# Where jax finds the other processes by itself, and what tells that there are others: the variables that
# `jax._src.clusters` reads. A host of a TPU slice on Compute Engine asks its metadata server, also when it is alone.
CLUSTERS: dict[str, Callable[[Environment], bool]] = {
    "TPU slice on Compute Engine": lambda environment: (
        running_in_cloud_tpu_vm and "TPU_SKIP_MDS_QUERY" not in environment
    ),
    "TPU slice on Kubernetes": lambda environment: (
        "," in environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    ),
    "TPU slices": _more_than_one("MEGASCALE_NUM_SLICES"),
    # Only srun gives the nodes of its step: a batch script's own shell stands for no task.
    "Slurm": lambda environment: "SLURM_STEP_NODELIST" in environment and _more_than_one("SLURM_NTASKS")(environment),
    "Open MPI": _more_than_one("OMPI_COMM_WORLD_SIZE"),
    "Kubernetes": lambda environment: "JOB_COMPLETION_INDEX" in environment,
}


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 100,
    initialization_timeout: int = 300,
    environment: Environment = os.environ,
) -> None:
    """Joins this process to the others of its run, if there are others; call it before anything asks for a device.

    Args:
      coordinator: HOST:PORT, a free port of the machine of process 0, that every process can reach.
      num_processes, process_id: how many there are, and which of them this is, from 0. Either all three are given,
        or none: then the environment tells whether there are others (`CLUSTERS`). A `num_processes` of 1 alone: none.
      heartbeat_timeout: seconds after which a silent process counts as dead; the runtime then ends the others.
      initialization_timeout: seconds to wait for the others to come.
      environment: what to look for clusters in.

    Raises:
      UsageError: some of the three are missing or don't fit, or the cluster could not be asked.
    """
    if (coordinator, num_processes, process_id) == (None, 1, None):
        return
    flags = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if 0 < len(missing) < len(flags):
        raise UsageError(f"{' and '.join(missing)} missing: give all of {', '.join(flags)}, or none of them.")
    if missing:
        cluster = next((name for name, present in CLUSTERS.items() if present(environment)), None)
        if cluster is None:
            return
        where, known = cluster, {}
    else:
        assert coordinator is not None and num_processes is not None and process_id is not None
        if not 0 <= process_id < num_processes:
            raise UsageError(
                f"--process-id is {process_id} and --num-processes is {num_processes}: number them from 0 to "
                f"{num_processes - 1}."
            )
        if not coordinator.rpartition(":")[2].isdigit():
            raise UsageError(f"--coordinator is '{coordinator}': give HOST:PORT, such as 10.0.0.1:1234.")
        where = f"{num_processes} processes at {coordinator}"
        known = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            **known, initialization_timeout=initialization_timeout, heartbeat_timeout_seconds=heartbeat_timeout
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"{where}: the processes did not find each other: {' '.join(str(error).split())} If this goes on, give "
            f"{', '.join(flags)}."
        ) from error


class PeerLost(RuntimeError):
    """Another process of the run did not come where all must meet."""


def exchange(place: str, text: str, timeout: int = 600) -> list[str]:
    """Every process's `text`, in the order of the processes: a barrier with a name and an end.

    Collectives of the devices have neither. All processes must call it in the same order of places.

    Args:
      place: what the error calls the place where the processes meet.
      text: what this process tells the others.
      timeout: seconds to wait for the others.

    Raises:
      PeerLost: not all came in time, or one is dead.
    """
    client = global_state.client
    if client is None:
        return [text]
    key = f"xattn/{next(_meetings)}/{place}"
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    try:
        client.wait_at_barrier(key, 1000 * timeout)
    except RuntimeError as error:
        raise PeerLost(
            f"process {jax.process_index()} waited at '{place}' for up to {timeout} s, but not every process of the "
            f"{jax.process_count()} came: {' '.join(str(error).split()).partition(' RPC:')[0]}"
        ) from error
    told = {int(path.rpartition("/")[2]): value for path, value in client.key_value_dir_get(key)}
    return [told[index] for index in range(jax.process_count())]


def first(place: str, action: Callable[[], Any]) -> Any:
    """What `action` gives in process 0, as JSON, in every process; only process 0 calls it and the others wait.

    Raises:
      UsageError: `action` raised it in process 0; it is raised in all.
      PeerLost: see `exchange`.
    """
    told = {}
    if jax.process_index() == 0:
        try:
            told = {"value": action()}
        except UsageError as error:
            told = {"error": str(error)}
    told = json.loads(exchange(place, json.dumps(told))[0])
    if "error" in told:
        raise UsageError(told["error"])
    return told["value"]


def check_same(place: str, facts: Mapping[str, str]) -> None:
    """Raises `UsageError` in every process unless all give the same facts; it names those that differ from most.

    Args:
      place: see `exchange`.
      facts: what is compared by what it is called, such as hashes.
    """
    told = [json.loads(text) for text in exchange(place, json.dumps(facts))]
    most = max(told, key=told.count)
    for index, other in enumerate(told):
        if other != most:
            names = sorted(name for name in most.keys() | other.keys() if most.get(name) != other.get(name))
            raise UsageError(
                f"process {index} differs from process {told.index(most)} in {', '.join(names)}: start every process "
                "with the same command, code and libraries."
            )


def gather(values: np.ndarray) -> list[np.ndarray]:
    """What every process gives, in the order of the processes, bit for bit; all give one shape and dtype."""
    if jax.process_count() == 1:
        return [values]
    rows = process_allgather(np.frombuffer(values.tobytes(), np.uint8))  # as floats, the devices would round doubles
    return [np.frombuffer(row.tobytes(), values.dtype).reshape(values.shape) for row in rows]


def fetch(array: Any) -> np.ndarray:
    """The whole of an array in every process, however the processes share it."""
    shared = isinstance(array, jax.Array) and not array.is_fully_addressable
    return process_allgather(array, tiled=True) if shared else np.asarray(array)


def leave(code: int) -> None:
    """Ends this process, which failed with an exit code, unless all others fail too within some seconds.

    At its exit jax would wait for the others, which wait for this process in the middle of a step. Once it is gone,
    the runtime ends them: at once if it was process 0, else after the heartbeat timeout of `start`.
    """
    if global_state.client is None:
        return
    try:
        global_state.client.wait_at_barrier("xattn/failed", 1000 * 10)
    except RuntimeError:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
