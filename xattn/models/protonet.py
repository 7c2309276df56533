"""Prototypical networks (Snell et al., arXiv 1703.05175).

    p_c    = mean_k f(support[c, k])                     logits[i, c] = -scale * mean((f(query[i]) - p_c)^2)

over all values of the last feature map. The baseline of the few-shot models: no attention, no parameter beside the
encoder's.

Deviations: the mean over values instead of their sum, times `scale`, so that logits start in a range where the softmax
is neither flat nor saturated for every encoder.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from xattn.layers.episode import embed_episode


class ProtoNet(nn.Module):
    """Nearest class mean in the space of `encoder`.

    Attributes:
      encoder: images [*B, H, W, C] to a tuple of feature maps, the last one last.
      scale: factor of the distances.
    """

    encoder: nn.Module
    scale: float = 10.0

    transductive = False

    @property
    def independent_features(self) -> bool:
        """Whether an image's feature is the same whatever images are embedded with it."""
        return getattr(self.encoder, "independent_features", True)

    def __call__(
        self, support: Float[Array, "*B N K H W C"], query: Float[Array, "*B Q H W C"], *, train: bool = False
    ) -> dict[str, Float[Array, "*B Q N"]]:
        """Logits of every query for every class, as `classify`."""
        return self.classify(*embed_episode(self.encoder, support, query, train=train), train=train)

    def features(self, images: Float[Array, "*B H W C"], *, train: bool = False) -> Float[Array, "*B h w D"]:
        """Last feature map of each image."""
        return self.encoder(images, train=train)[-1]

    def classify(
        self, support: Float[Array, "*B N K h w D"], query: Float[Array, "*B Q h w D"], *, train: bool = False
    ) -> dict[str, Float[Array, "*B Q N"]]:
        """Returns {"logits": float32 [*B, Q, N]} from feature maps; the distances are computed in float32."""
        del train
        support, query = support.astype(jnp.float32), query.astype(jnp.float32)
        distance = jnp.square(query[..., :, None, :, :, :] - support.mean(-4)[..., None, :, :, :, :]).mean((-3, -2, -1))
        return {"logits": -self.scale * distance}
