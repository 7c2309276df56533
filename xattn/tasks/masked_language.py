"""Masked language modelling: guess the bytes that were hidden.

    loss = sum_i m_i CE(logits_i, target_i) / sum_i m_i          m_i: byte i was hidden (or replaced)

As in BERT (arXiv 1810.04805) and in the language models of Perceiver IO (2107.14795, section 4.1); which bytes are
hidden is decided where the batches are made (`mask_words` in `xattn.data`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from xattn.tasks.common import forward


@dataclasses.dataclass(frozen=True)
class MaskedLanguage:
    """Loss and metrics of a batch of texts with hidden bytes."""

    def inputs(self, batch: Mapping[str, Array]) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
        """The model's arguments: the corrupted tokens, and which of them are no padding."""
        return batch["tokens"], batch["input_mask"]

    def __call__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        batch: Mapping[str, Array],
        *,
        train: bool,
        rngs: dict[str, PRNGKeyArray] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], dict[str, Any]]:
        """Loss of `batch`, a mean over its hidden bytes.

        Args:
          model: tokens [B, M] and their mask [B, M] to logits [B, M, V].
          variables: of the model.
          batch: `tokens` int32 [B, M] with hidden ones; `targets` int32 [B, M], what they were; `loss_mask` bool
            [B, M], True where hidden; `input_mask` bool [B, M], False for padding.
          train: passed on to the model.
          rngs: of the model, "dropout" in training.

        Returns:
          loss; metrics loss and accuracy, both on hidden bytes alone (0 where there are none); new batch statistics.
        """
        logits, state = forward(model, variables, self.inputs(batch), train=train, rngs=rngs)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["targets"])
        hidden = batch["loss_mask"]
        count = jnp.maximum(hidden.sum(), 1)
        loss = jnp.sum(hidden * entropy) / count
        accuracy = jnp.sum(hidden & (logits.argmax(-1) == batch["targets"])) / count
        return loss, {"loss": loss, "accuracy": accuracy}, state
