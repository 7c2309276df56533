"""Cross-attention, and the systems that stand on it, in JAX and Flax Linen."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xattn import interop
    from xattn.checkpoints import load

__all__ = ["interop", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # At first use: they import Orbax and every model, which a program that takes one layer would wait for, and jax,
    # which must not be in the process that only starts benchmarks.
    if name == "interop":
        return importlib.import_module("xattn.interop")
    if name == "load":
        return importlib.import_module("xattn.checkpoints").load
    raise AttributeError(f"module 'xattn' has no attribute '{name}'")
