"""Convolution and normalisation of image encoders, with logical axis names."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from xattn.config import UsageError

CONV_AXES = ("conv_height", "conv_width", "conv_in", "conv_out")


GROUP = 8
"""Images whose part of a kernel's gradient is computed together on a CPU: of all of an episode's 80 at once, XLA's CPU
backend makes a program that takes up to 4 times as long."""
GROUPS = 16
"""Groups at most, of either kind: each is compiled by itself."""
LARGE = 2**30
"""Multiply-adds of a convolution from which on that is done: of smaller ones it would spare milliseconds."""
CACHE = 2**25
"""Bytes of a feature map that a CPU's cache holds: XLA's convolutions of larger ones take up to a third longer."""


def conv(features: int, size: int, *, name: str, dtype: Dtype | None = None) -> nn.Conv:
    """Convolution without bias, stride 1, "same" size for odd `size`, initialised N(0, 2 / (size^2 features)).

    Where it is large, on one CPU, it is differentiable in reverse mode only; see `conv_general_dilated`.
    """
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(
        features,
        (size, size),
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(init, CONV_AXES),
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def conv_general_dilated(
    images: Float[Array, "B H W C"],
    kernel: Float[Array, "h w C D"],
    window_strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> Float[Array, "B H2 W2 D"]:
    """`jax.lax.conv_general_dilated`, whose kernel's gradient is summed over groups of images where that is faster.

    That is on a single CPU, for convolutions of `LARGE` and more.
    """
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options
    )
    out = jax.eval_shape(convolve, images, kernel)
    multiply_adds = math.prod(out.shape[:-1]) * kernel.size
    if multiply_adds < LARGE or not _on_one_cpu():
        return convolve(images, kernel)
    return _summed(convolve, images, kernel)


def in_groups(encode: Callable[[Float[Array, "B H W C"]], Any], images: Float[Array, "*B H W C"], features: int) -> Any:
    """`encode(images)` of an encoder that looks at each image by itself, in groups of images where that is faster.

    That is on a single CPU, where a float32 map of all images, as large as they are with this many `features`, is
    larger than `CACHE`: then in the fewest groups for which it is not, or `GROUPS`. Outputs are arrays [*B, ...].
    """
    *batch, height, width, channels = images.shape
    count = math.prod(batch)
    groups = min(GROUPS, -(-4 * count * height * width * features // CACHE))
    if groups < 2 or not _on_one_cpu():
        return encode(images)
    size = -(-count // groups)
    rows = images.reshape(count, height, width, channels)
    parts = [encode(rows[i : i + size]) for i in range(0, count, size)]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs).reshape(*batch, *xs[0].shape[1:]), *parts)


def _on_one_cpu() -> bool:
    """Whether the program is for CPUs and no mesh splits the images."""
    split = jax.sharding.get_abstract_mesh()
    return jax.default_backend() == "cpu" and (split.empty or split.size == 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(convolve: Callable[..., Any], images: Any, kernel: Any) -> Any:
    return convolve(images, kernel)


def _forward(convolve: Callable[..., Any], images: Any, kernel: Any) -> Any:
    return convolve(images, kernel), (images, kernel)


def _backward(convolve: Callable[..., Any], residuals: tuple[Any, Any], d_out: Any) -> tuple[Any, Any]:
    images, kernel = residuals
    (d_images,) = jax.linear_transpose(lambda images: convolve(images, kernel), images)(d_out)
    size = max(GROUP, -(-len(images) // GROUPS))
    d_kernel: Any = 0
    for i in range(0, len(images), size):
        part, d_part = images[i : i + size], d_out[i : i + size]
        d_kernel += jax.linear_transpose(functools.partial(convolve, part), kernel)(d_part)[0]
    return d_images, d_kernel


_summed.defvjp(_forward, _backward)


def max_pool(x: Float[Array, "*B H W C"]) -> Float[Array, "*B h w C"]:
    """Maximum over 2x2 windows with stride 2; an odd last row or column is dropped.

    Equal to `nn.max_pool(x, (2, 2), (2, 2))`, whose gradient is ten times slower on CPU. The gradient of equal values
    goes to the first of them.
    """
    *batch, height, width, channels = x.shape
    h, w = height // 2, width // 2
    x = x[..., : 2 * h, : 2 * w, :].reshape(*batch, h, 2, w, 2, channels)
    # Not `max`: its gradient goes where input equals output, and a compiler that computes one of them twice with
    # another rounding finds no such place. A choice always passes the gradient on.
    x = jnp.where(x[..., 0, :, :, :] >= x[..., 1, :, :, :], x[..., 0, :, :, :], x[..., 1, :, :, :])
    return jnp.where(x[..., 0, :] >= x[..., 1, :], x[..., 0, :], x[..., 1, :])


def image_norm(
    x: Float[Array, "*B H W C"],
    *,
    kind: str,
    train: bool,
    name: str,
    num_groups: int = 8,
    axis_name: str | None = None,
    dtype: Dtype | None = None,
) -> Float[Array, "*B H W C"]:
    """Adds "batch" or "group" normalisation with scale and bias, epsilon 1e-5, to the module that calls it.

    BatchNorm averages over the images of all leading axes. It is torch's but for the running variance, which is the
    biased estimate as in all of Flax. `axis_name` is the mapped axis over which the statistics are averaged as well
    (pmap, shard_map); under jit over a mesh they are global already. GroupNorm looks at one image at a time.
    """
    common: dict[str, Any] = dict(
        epsilon=1e-5,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )
    if kind == "batch":
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=axis_name, **common)(x)
    if kind == "group":
        return nn.GroupNorm(num_groups, **common)(x.reshape(-1, *x.shape[-3:])).reshape(x.shape)
    raise UsageError(f"norm '{kind}' is none of batch, group.")
