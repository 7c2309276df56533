"""What tasks share: pixels to float32, and one forward pass that may change batch statistics."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray, Shaped


def normalize(
    images: Shaped[Array, "*B H W C"], mean: float | tuple[float, ...], std: float | tuple[float, ...]
) -> Float[Array, "*B H W C"]:
    """(pixels / 255 - mean) / std in float32 from uint8 images; float images are taken to be normalised already."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def forward(
    model: nn.Module,
    variables: Mapping[str, Any],
    inputs: tuple,
    *,
    train: bool,
    rngs: dict[str, PRNGKeyArray] | None,
    **keywords: Any,
) -> tuple[Any, dict[str, Any]]:
    """The model's outputs for positional `inputs`, and its new batch statistics, or {} where there are none."""
    mutable = ["batch_stats"] if train and "batch_stats" in variables else []
    outputs, state = model.apply(variables, *inputs, train=train, rngs=rngs, mutable=mutable, **keywords)
    return outputs, dict(state)
