"""A few cases of some rows of the drill; `make drill` has all."""

import pytest

from tests.distributed.drill import ROWS

COUNTS = {"kill": 5, "damage": 26, "sigterm": 1, "restore": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_what_machines_do_changes_nothing(name, tmp_path):
    row, _ = ROWS[name]
    print(row(tmp_path, COUNTS[name]))
