"""Several processes as one run: how they find each other, and how they meet.

A TPU pod slice, Slurm, Kubernetes and MPI tell each process about the others by environment variables; `start` sees
that there are others, and `jax.distributed.initialize` finds them. Elsewhere, flags of the command line tell.
"""

import os
from collections.abc import Callable, Mapping

import jax
from jax._src import cloud_tpu_init  # nothing public tells that this is a TPU host before its devices are opened

from xattn.config import UsageError

Environment = Mapping[str, str]


def _more_than_one(variable: str) -> Callable[[Environment], bool]:
    return lambda environment: environment.get(variable, "1") not in ("", "0", "1")


# Where jax finds the other processes by itself, and what tells that there are others: the variables that
# `jax._src.clusters` reads. A host of a TPU slice on Compute Engine asks its metadata server, also when it is alone.
CLUSTERS: dict[str, Callable[[Environment], bool]] = {
    "TPU slice on Compute Engine": lambda environment: (
        cloud_tpu_init.running_in_cloud_tpu_vm and "TPU_SKIP_MDS_QUERY" not in environment
    ),
    "TPU slice on Kubernetes": lambda environment: (
        "," in environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    ),
    "TPU slices": _more_than_one("MEGASCALE_NUM_SLICES"),
    "Slurm": lambda environment: "SLURM_PROCID" in environment and _more_than_one("SLURM_NTASKS")(environment),
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
        or none: then the environment tells whether there are others (`CLUSTERS`).
      heartbeat_timeout: seconds after which a silent process counts as dead; the runtime then ends the others.
      initialization_timeout: seconds to wait for the others to come.
      environment: what to look for clusters in.

    Raises:
      UsageError: some of the three are missing or don't fit, or the other processes did not come.
    """
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
        raise UsageError(f"{where}: the processes did not find each other: {' '.join(str(error).split())}") from error
