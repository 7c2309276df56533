"""Optical flow: where each pixel of the first frame has gone in the second.

    loss = mean over valid pixels of |output - flow / 20|          (end-point error, in units of 20 pixels)

Perceiver IO (arXiv 2107.14795, section 4.2) reads the 3 x 3 neighbourhood of every pixel in both frames, scaled to
[-1, 1]. The released model divides its output by 100 inside, and is multiplied by 20 outside to give pixels: 20 is
`FLOW_SCALE`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from xattn.ops.patches import flow_patches
from xattn.tasks.common import forward

FLOW_SCALE = 20.0


@dataclasses.dataclass(frozen=True)
class OpticalFlow:
    """Loss and metrics of a batch of pairs of frames."""

    def inputs(self, batch: Mapping[str, Array]) -> tuple[Float[Array, "B 2 H W 27"]]:
        """The model's arguments: the patches of `frames` in [-1, 1]."""
        return (flow_patches(batch["frames"].astype(jnp.float32) / 255 * 2 - 1),)

    def __call__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        batch: Mapping[str, Array],
        *,
        train: bool,
        rngs: dict[str, PRNGKeyArray] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], dict[str, Any]]:
        """Loss of `batch`, a mean over its valid pixels.

        Args:
          model: patches [B, 2, H, W, 27] to flow [B, H, W, 2] in units of `FLOW_SCALE` pixels.
          variables: of the model.
          batch: `frames` uint8 [B, 2, H, W, 3]; `flow` float32 [B, H, W, 2], (x, y) in pixels; `valid` bool [B, H, W].
          train: passed on to the model.
          rngs: of the model, "dropout" in training.

        Returns:
          loss; metrics loss and epe (the end-point error in pixels); new batch statistics.
        """
        output, state = forward(model, variables, self.inputs(batch), train=train, rngs=rngs)
        valid = batch["valid"]
        errors = end_point_error(output.astype(jnp.float32), batch["flow"] / FLOW_SCALE)
        loss = jnp.sum(jnp.where(valid, errors, 0)) / jnp.maximum(valid.sum(), 1)
        return loss, {"loss": loss, "epe": FLOW_SCALE * loss}, state


def end_point_error(flow: Float[Array, "*B 2"], truth: Float[Array, "*B 2"]) -> Float[Array, "*B"]:
    """|flow - truth|, with gradient zero where they are equal."""
    return optax.safe_norm(flow - truth, 0.0, axis=-1)
