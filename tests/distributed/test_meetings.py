"""Where processes meet: what they tell each other there, and that no one waits for ever."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.distributed import launch
from xattn.parallel.distributed import PeerLost, exchange, first, gather


def meet(folder: str) -> None:
    """All meet; then process 1 stays away until process 0 has given up."""
    index, told = jax.process_index(), Path(folder) / "told.txt"
    said = exchange("one place", f"process {index}"), first("another", lambda: {"from": index})
    doubles = [row.tolist() for row in gather(np.array([0.1 + index, np.nan, -0.0]))]
    (Path(folder) / f"{index}.json").write_text(json.dumps([*said, doubles]))
    if index == 0:
        with pytest.raises(PeerLost) as error:
            exchange("the last place", "", timeout=1)
        told.write_text(str(error.value))
    while not told.exists():
        time.sleep(0.05)


def test_processes_tell_each_other_and_give_up_with_the_name_of_the_place(tmp_path):
    launch.run("tests.distributed.test_meetings:meet", tmp_path, folder=tmp_path, num_devices=1)
    first_one, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in range(2))
    np.testing.assert_equal(first_one, second)
    texts, chosen, doubles = first_one
    assert texts == ["process 0", "process 1"]
    assert chosen == {"from": 0}
    np.testing.assert_equal(doubles, [[0.1, np.nan, -0.0], [1.1, np.nan, -0.0]])  # to the last bit of a double
    told = (tmp_path / "told.txt").read_text()
    assert told.startswith("process 0 waited at 'the last place' for up to 1 s, but not every process of the 2 came")
    assert told.rstrip().endswith("Some timed out task names: 1")
