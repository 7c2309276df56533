"""Bicubic resizing of images as torch computes it.

On each axis, output i of n' takes from an input of size n, around its source coordinate s = (i + 0.5) n / n' - 0.5, the
pixels floor(s) - 1 .. floor(s) + 2, clamped to the image, with the weights k(s - pixel) of Keys' kernel, a = -0.75:

    k(t) = (a + 2) |t|^3 - (a + 3) |t|^2 + 1           |t| <= 1
           a |t|^3 - 5 a |t|^2 + 8 a |t| - 4 a     1 < |t| < 2

Equal to `torch.nn.functional.interpolate(mode="bicubic", align_corners=False, antialias=False)`. `jax.image.resize` has
a = -0.5, drops the weights outside of the image and filters when it makes an image smaller.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_A = -0.75


def bicubic_resize(images: Float[Array, "*B H W C"], size: tuple[int, int]) -> Float[Array, "*B h w C"]:
    """Images of `size` (height, width); those that have it already come back as they are.

    Args:
      images: [*B, H, W, C].
      size: (h, w).
    """
    for axis, length in zip((-3, -2), size, strict=True):
        if images.shape[axis] != length:
            images = _resize_axis(images, axis, length)
    return images


def _resize_axis(x: jax.Array, axis: int, length: int) -> jax.Array:
    size = x.shape[axis]
    source = (np.arange(length) + 0.5) * size / length - 0.5
    first = np.floor(source).astype(int) - 1
    total: jax.Array | float = 0.0
    for tap in range(4):
        weights = _kernel(np.abs(source - (first + tap)))
        shape = [1] * x.ndim
        shape[axis] = length
        pixels = jnp.take(x, np.clip(first + tap, 0, size - 1), axis=axis)
        total = total + pixels * jnp.asarray(weights.reshape(shape), x.dtype)
    return jnp.asarray(total)


def _kernel(t: np.ndarray) -> np.ndarray:
    near = (_A + 2) * t**3 - (_A + 3) * t**2 + 1
    far = _A * t**3 - 5 * _A * t**2 + 8 * _A * t - 4 * _A
    return np.where(t <= 1, near, far)
