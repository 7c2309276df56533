"""Cross-attention, and the systems that stand on it, in JAX and Flax Linen."""

from xattn import interop
from xattn.checkpoints import load

__all__ = ["interop", "load"]
__version__ = "0.1.0"
