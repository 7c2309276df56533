"""Additive attention, the first attention: a small network scores every (query, key) pair."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from xattn.ops.attention import dropout
from xattn.ops.attention.api import checked_mask
from xattn.ops.attention.masks import Mask
from xattn.ops.attention.xla import cap_bias_mask, softmax, weighted_sum

BLOCK_ELEMENTS = 2**22
"""Elements of the tanh layer that exist at a time; [B, N, M, H, D] as a whole would not fit."""


def additive_attention(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    value: Float[Array, "*B M G Dv"],
    energy: Float[Array, "H D"],
    *,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | Mask | None = None,
    scale: float | Float[Array, "..."] = 1.0,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | None = None,
    return_lse: bool = False,
) -> Float[Array, "*B N H Dv"] | tuple[Float[Array, "*B N H Dv"], Float[Array, "*B H N"]]:
    """Attention with the scores  s_hnm = scale * energy_h . tanh(q_nh + k_mh)  (arXiv 1409.0473, A.1.2).

    The paper's v_a is `energy`, W_a s and U_a h are `query` and `key`. From the scores on everything is as
    in `dot_product_attention`: soft cap, bias, mask, softmax in float32, dropout, and zeros for a row
    without keys. The tanh layer is computed for a few queries at a time, again in the backward pass.

    Args:
      query: [*B, N, H, D].
      key: [*B, M, G, D].
      value: [*B, M, G, Dv].
      energy: [H, D], the last layer of the scoring network.
      bias, mask, scale, logits_soft_cap, dropout_rate, dropout_rng, return_lse: see
        `dot_product_attention`.

    Returns:
      Output [*B, N, H, Dv] in the dtype of `value`; with `return_lse` also float32 [*B, H, N].

    Raises:
      ValueError: if shapes do not fit.

    Deviations: several heads (the paper has one).
    """
    mask = checked_mask(query, key, value, bias, mask, scale, dropout_rate, dropout_rng)
    scores = additive_scores(query, key, energy, bias=bias, mask=mask, scale=scale, logits_soft_cap=logits_soft_cap)
    weights, lse = softmax(scores)
    if dropout_rng is not None and dropout_rate:
        weights = dropout.drop_all(weights, dropout_rng, dropout_rate)
    out = weighted_sum(weights, value)
    return (out, lse) if return_lse else out


def additive_scores(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    energy: Float[Array, "H D"],
    *,
    bias: Float[Array, "..."] | None,
    mask: Mask,
    scale: Any,
    logits_soft_cap: float | None,
) -> Float[Array, "*B H N M"]:
    """The scores of `additive_attention`, capped, biased and masked, float32 or wider."""
    if energy.shape != query.shape[-2:]:
        raise ValueError(f"energy {energy.shape} must be [H, D] of the query, {query.shape[-2:]}.")
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    key = jnp.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)

    @jax.checkpoint
    def row(query):
        hidden = jnp.tanh(query[..., None, :, :] + key)
        return jnp.einsum("...mhd,hd->...hm", hidden, energy, preferred_element_type=dtype)

    rows = jax.lax.map(row, jnp.moveaxis(query, -3, 0), batch_size=max(1, BLOCK_ELEMENTS // math.prod(key.shape)))
    scores = jnp.moveaxis(rows, 0, -2) * jnp.asarray(scale, dtype)[..., None, None]
    block = mask.block(0, query.shape[-3], 0, key.shape[-3])
    return cap_bias_mask(scores, bias=bias, mask=block, logits_soft_cap=logits_soft_cap)
