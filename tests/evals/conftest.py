"""Sources that a test registers under one name are not those of the test before."""

import pytest

from xattn.evals import examples, masked_language


@pytest.fixture(autouse=True)
def forget():
    examples._open.cache_clear()
    masked_language._favourite.cache_clear()
