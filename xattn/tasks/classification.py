"""Classification of whole inputs.

    y = onehot(label), or  mix onehot(label) + (1 - mix) onehot(label_b)  for a batch of mixed images
    loss = CE(logits, (1 - s) y + s / K)                                  with label smoothing s over K classes

The released recipe of Perceiver IO on ImageNet (arXiv 2107.14795; deepmind-research/perceiver/train) smooths by 0.1,
mixes half of a batch by mixup (arXiv 1710.09412) and half by cutmix (1905.04899), and counts the accuracy against the
first label.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from xattn.tasks.common import forward, normalize


@dataclasses.dataclass(frozen=True)
class Classification:
    """Loss and metrics of a batch of labelled images.

    Attributes:
      label_smoothing: s, the share of the target that is spread over all classes.
      mean, std: of the pixels in [0, 1], one number or one a channel.
    """

    label_smoothing: float = 0.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0

    def prepare(self, images: Shaped[Array, "*B H W C"]) -> Float[Array, "*B H W C"]:
        """Normalised float32 images from uint8 ones; float images are taken to be normalised already."""
        return normalize(images, self.mean, self.std)

    def inputs(self, batch: Mapping[str, Array]) -> tuple[Float[Array, "B H W C"]]:
        """The model's arguments: the prepared images."""
        return (self.prepare(batch["image"]),)

    def __call__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        batch: Mapping[str, Array],
        *,
        train: bool,
        rngs: dict[str, PRNGKeyArray] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], dict[str, Any]]:
        """Loss of `batch`, a mean over its examples.

        Args:
          model: images [B, H, W, C] to logits [B, K].
          variables: of the model.
          batch: `image` uint8 [B, H, W, C] and `label` int32 [B]; for mixed images also `label_b` int32 [B] and `mix`
            float32 [B], the weight of `label`.
          train: passed on to the model. Batch statistics are updated if there are any.
          rngs: of the model, "dropout" in training.

        Returns:
          loss; metrics loss and accuracy (against `label`); the new batch statistics as {"batch_stats": ...}, or {}.
        """
        logits, state = forward(model, variables, self.inputs(batch), train=train, rngs=rngs)
        logits = logits.astype(jnp.float32)
        targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        if "mix" in batch:
            mix = batch["mix"][:, None]
            targets = mix * targets + (1 - mix) * jax.nn.one_hot(batch["label_b"], logits.shape[-1])
        loss = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, self.label_smoothing)).mean()
        accuracy = jnp.mean(logits.argmax(-1) == batch["label"])
        return loss, {"loss": loss, "accuracy": accuracy}, state
