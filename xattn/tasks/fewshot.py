"""Few-shot classification by episodes.

    loss = alpha CE(logits, y) + (1 - alpha) CE(global_scores / tau, y)          (QSFormer, arXiv 2208.12398)
    loss = CE(logits, y)                                                         for a model without global scores

The global scores are sums of attention weights, so the second term is the cross-entropy of a softmax over
probabilities: it cannot go below log(1 + (N - 1) exp(-L / tau)) with L blocks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from xattn.tasks.common import forward, normalize


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Loss and metrics of a batch of episodes.

    Attributes:
      alpha: weight of the cross-entropy of the logits.
      tau: temperature of the global scores.
      mean, std: of the pixels in [0, 1], one number or one a channel.
    """

    alpha: float = 1.0
    tau: float = 1.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0

    def prepare(self, images: Shaped[Array, "*B H W C"]) -> Float[Array, "*B H W C"]:
        """Normalised float32 images from uint8 ones; float images are taken to be normalised already."""
        return normalize(images, self.mean, self.std)

    def inputs(self, batch: Mapping[str, Array]) -> tuple[Float[Array, "*B N K H W C"], Float[Array, "*B Q H W C"]]:
        """The model's arguments: prepared support and query images."""
        return self.prepare(batch["support"]), self.prepare(batch["query"])

    def __call__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        batch: Mapping[str, Array],
        *,
        train: bool,
        rngs: dict[str, PRNGKeyArray] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]], dict[str, Any]]:
        """Loss of `batch`, means over its episodes and queries.

        Args:
          model: support [B, N, K, H, W, C] and query [B, Q, H, W, C] to a dict with logits [B, Q, N], perhaps also
            global_scores and local_logits.
          variables: of the model.
          batch: `support` and `query` images, `query_labels` int32 [B, Q].
          train: passed on to the model. Batch statistics are updated if there are any.
          rngs: of the model, "dropout" in training.

        Returns:
          loss; metrics loss, accuracy, and global_accuracy and local_accuracy where the model has these branches;
          the new batch statistics as {"batch_stats": ...}, or {}.
        """
        out, state = forward(model, variables, self.inputs(batch), train=train, rngs=rngs)
        labels = batch["query_labels"]

        loss = _cross_entropy(out["logits"], labels)
        if "global_scores" in out:
            loss = self.alpha * loss + (1 - self.alpha) * _cross_entropy(out["global_scores"] / self.tau, labels)
        metrics = {"loss": loss, "accuracy": _accuracy(out["logits"], labels)}
        for branch in ("global_scores", "local_logits"):
            if branch in out:
                metrics[branch.split("_")[0] + "_accuracy"] = _accuracy(out[branch], labels)
        return loss, metrics, state


def _cross_entropy(logits: Float[Array, "B Q N"], labels: Int[Array, "B Q"]) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _accuracy(logits: Float[Array, "B Q N"], labels: Int[Array, "B Q"]) -> Float[Array, ""]:
    return jnp.mean(logits.argmax(-1) == labels)
