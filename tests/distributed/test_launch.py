"""The launcher of the other tests in this folder."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from tests.distributed import launch


def tell(folder: str) -> None:
    """Writes what one process sees of the others."""
    total = multihost_utils.process_allgather(np.asarray(1 + jax.process_index())).sum()
    seen = [jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count(), int(total)]
    (Path(folder) / f"{jax.process_index()}.json").write_text(json.dumps(seen))


def fail(word: str) -> None:
    raise ValueError(f"{word} in process {jax.process_index()}")


def test_every_process_sees_the_devices_of_all(tmp_path):
    launch.run("tests.distributed.test_launch:tell", tmp_path, folder=tmp_path, num_processes=2, num_devices=3)
    assert [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2)] == [
        [0, 2, 3, 6, 3],
        [1, 2, 3, 6, 3],
    ]


def test_a_failure_tells_what_its_process_printed(tmp_path):
    with pytest.raises(AssertionError, match="(?s)exit codes .* broken in process 1"):
        launch.run("tests.distributed.test_launch:fail", "broken", folder=tmp_path)
