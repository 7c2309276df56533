"""Eight simulated devices, a persistent compilation cache and checked annotations for every test."""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version

# Programs that run once are not worth optimising: without LLVM's passes the suite compiles in half the time, and
# without fusion emitters, which later versions can't turn off, in a sixth of that.
FLAGS = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from absl import flags

from xattn.config import cache_compiled_programs


def pytest_configure() -> None:
    # grain reads absl flags when it starts workers.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    cache_compiled_programs("tests")


@pytest.fixture(autouse=True)
def small_heap() -> Iterator[None]:
    """Keeps the garbage collector fast, and lets each test's garbage say what it has to say in that test.

    Compiled programs are millions of objects that stay: going through them takes seconds each time.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # With a long test at the end, one of two workers would wait for the other.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
