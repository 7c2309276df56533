"""Few-shot episodes: one support set and its queries."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def embed_episode(
    encoder: nn.Module, support: Float[Array, "*B N K H W C"], query: Float[Array, "*B Q H W C"], *, train: bool
) -> tuple[Float[Array, "*B N K h w D"], Float[Array, "*B Q h w D"]]:
    """Last feature maps of support and query, which go through the encoder as one batch an episode, support first.

    One batch matters where an image's feature depends on the images beside it: BatchNorm in training, `CIFE` with
    attention over the batch.
    """
    *batch, ways, shots, _, _, _ = support.shape
    rows = jnp.concatenate([support.reshape(*batch, ways * shots, *support.shape[-3:]), query], axis=-4)
    features = encoder(rows, train=train)[-1]
    of_support, of_query = jnp.split(features, [ways * shots], axis=-4)
    return of_support.reshape(*batch, ways, shots, *features.shape[-3:]), of_query
