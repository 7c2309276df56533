"""Convolution and normalisation of image encoders, with logical axis names."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from xattn.config import UsageError

CONV_AXES = ("conv_height", "conv_width", "conv_in", "conv_out")


def conv(features: int, size: int, *, name: str, dtype: Dtype | None = None) -> nn.Conv:
    """Convolution without bias, stride 1, "same" size for odd `size`, initialised N(0, 2 / (size^2 features))."""
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(
        features,
        (size, size),
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(init, CONV_AXES),
        name=name,
    )


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
