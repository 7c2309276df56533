"""Whether a process has others beside it; how they meet is tested in `tests/distributed`."""

import jax
import numpy as np
import pytest

from xattn.config import UsageError
from xattn.parallel import distributed
from xattn.parallel.distributed import check_same, exchange, fetch, first, gather, start
from xattn.parallel.mesh import part_of


@pytest.fixture
def started(monkeypatch):
    """What `jax.distributed.initialize` is called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **keywords: calls.append(keywords))
    return calls


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # in a batch script, not in a task of srun
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # any pod
    ],
)
def test_the_environment_tells_whether_there_are_others(started, environment, several):
    start(environment=environment)
    assert started == ([{"initialization_timeout": 300, "heartbeat_timeout_seconds": 100}] if several else [])


def test_a_tpu_host_asks_unless_it_is_told_not_to(started, monkeypatch):
    monkeypatch.setattr(distributed, "running_in_cloud_tpu_vm", True)
    start(environment={"TPU_SKIP_MDS_QUERY": "1"})
    assert started == []
    start(environment={})
    assert len(started) == 1


def test_flags_go_before_the_environment(started):
    start("10.0.0.1:99", 2, 1, heartbeat_timeout=7, environment={"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n"})
    assert started == [
        {
            "coordinator_address": "10.0.0.1:99",
            "num_processes": 2,
            "process_id": 1,
            "cluster_detection_method": "deactivate",
            "initialization_timeout": 300,
            "heartbeat_timeout_seconds": 7,
        }
    ]


def test_a_process_may_be_told_that_it_is_alone(started):
    start(num_processes=1, environment={"JOB_COMPLETION_INDEX": "3"})
    assert started == []


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("a:1", None, None), "--num-processes and --process-id missing: give all of --coordinator, --num-processes"),
        ((None, 2, 1), "--coordinator missing"),
        (("a:1", 2, 2), "--process-id is 2 and --num-processes is 2: number them from 0 to 1"),
        (("a", 2, 1), "--coordinator is 'a': give HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(started, flags, sentence):
    with pytest.raises(UsageError, match=sentence):
        start(*flags, environment={})
    assert started == []


def test_a_cluster_that_can_not_be_used_is_one_sentence(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UsageError, match="^Open MPI: .* coordinator_address should be defined. .* give --coordinator"):
        start(environment={"OMPI_COMM_WORLD_SIZE": "2"})


def test_one_process_meets_itself():
    assert exchange("here", "word") == ["word"]
    assert first("here", lambda: {"a": [1, 2.5]}) == {"a": [1, 2.5]}
    with pytest.raises(UsageError, match="^wrong$"):
        first("here", lambda: (_ for _ in ()).throw(UsageError("wrong")))
    check_same("here", {"a": "1"})
    (values,) = gather(np.array([0.1, 0.2]))
    assert values.dtype == np.float64
    np.testing.assert_array_equal(fetch(jax.numpy.arange(3)), [0, 1, 2])


def test_those_that_differ_from_most_are_named(monkeypatch):
    texts = ['{"config.seed": "a", "step": "b"}'] * 3
    monkeypatch.setattr(distributed, "exchange", lambda place, text: ['{"config.seed": "z", "step": "b"}', *texts])
    with pytest.raises(UsageError, match="^process 0 differs from process 1 in config.seed: start every process"):
        check_same("here", {})


# Rows by process, from the owners of the devices of a mesh [data x fsdp, tensor x sequence].


@pytest.mark.parametrize(
    "owners, parts",
    [
        ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),
        ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),
        ([[0, 0, 1, 1]], [(0, 1), (0, 1)]),  # two processes share every row
        ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([[1], [1], [0], [0]], [(1, 2), (0, 2)]),
    ],
)
def test_processes_that_share_rows_read_the_same_ones(owners, parts):
    assert [part_of(process, np.array(owners), len(parts)) for process in range(len(parts))] == parts


@pytest.mark.parametrize(
    "owners, count",
    [
        ([[0], [0]], 2),  # process 1 has no device in it
        ([[0], [0], [0], [1]], 2),
        ([[0], [1], [0], [1]], 2),  # rows that are not one behind the other
        ([[0, 0], [0, 1], [1, 1], [1, 1]], 2),
    ],
)
def test_a_mesh_that_does_not_fit_the_processes_is_refused(owners, count):
    assert part_of(0, np.array(owners), count) is None
