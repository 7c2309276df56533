"""Random inputs and variables made by NumPy: no initialiser and no generator has to be compiled."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta


def normal(*shape, seed=0):
    """Standard normal float32 values."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_variables(model, *inputs, seed=0):
    """Variables of the shapes of `model.init(key, *inputs)`, none of them at its initial 0 or 1."""
    rng = np.random.default_rng(seed)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))

    def fill(path, leaf):
        name = path[-1].key
        noise = rng.normal(size=leaf.shape)
        if name in ("scale", "var"):
            return jnp.asarray(np.exp(0.2 * noise), leaf.dtype)
        if name == "kernel":  # out/kernel [H, D, C] reads both its first axes; the other 3-D kernels read one
            fan_in = leaf.size // leaf.shape[-1] if len(leaf.shape) == 4 or path[-2].key == "out" else leaf.shape[0]
            return jnp.asarray(noise / np.sqrt(fan_in), leaf.dtype)
        return jnp.asarray(0.2 * noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
