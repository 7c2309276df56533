"""Dense attention: the whole score matrix at once, left to XLA to fuse."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xattn.ops.attention import dropout
from xattn.ops.attention.masks import Mask


def cap_bias_mask(
    scores: Float[Array, "*B H N M"],
    *,
    bias: Float[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    logits_soft_cap: float | None,
) -> Float[Array, "*B H N M"]:
    """Soft cap, bias and mask, in this order; masked scores become -inf."""
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def dot_scores(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    *,
    scale: Any,
    bias: Float[Array, "..."] | None,
    mask: Bool[Array, "..."] | None,
    logits_soft_cap: float | None,
) -> Float[Array, "*B H N M"]:
    """Scaled, capped, biased and masked scores, float32 or wider. Head h reads key head h // (H / G)."""
    *batch, num_queries, heads, width = query.shape
    groups = key.shape[-2]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    # Heads that share a key head become more queries of it, [*B, (H / G) N, G, D], so that both products are
    # those of equal heads; for H = G these steps move nothing.
    query = jnp.moveaxis(query.reshape(*batch, num_queries, groups, heads // groups, width), -2, -4)
    query = query.reshape(*batch, heads // groups * num_queries, groups, width)
    scores = jnp.einsum("...nhd,...mhd->...hnm", query, key, preferred_element_type=dtype)
    scores = scores.reshape(*batch, heads, num_queries, key.shape[-3])
    scores = scores * jnp.asarray(scale, dtype)[..., None, None]
    return cap_bias_mask(scores, bias=bias, mask=mask, logits_soft_cap=logits_soft_cap)


def exponentials(
    scores: Float[Array, "*B H N M"],
) -> tuple[Float[Array, "*B H N M"], Float[Array, "*B H N 1"], Float[Array, "*B H N"]]:
    """e^(s - max) for each key, what its row must be divided by (the sum, or 1 for 0), and the log-sum-exp.

    A row of -inf gives 0, 1 and -inf.
    """
    shift = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf))
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    mass = jnp.exp(scores - shift)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    some = jnp.where(total == 0, 1, total)
    lse = jnp.where(total == 0, -jnp.inf, shift + jnp.log(some))
    return mass, some, lse[..., 0]


def softmax(scores: Float[Array, "*B H N M"]) -> tuple[Float[Array, "*B H N M"], Float[Array, "*B H N"]]:
    """Softmax over the keys and the log-sum-exp; a row of -inf gives weights 0 and -inf."""
    mass, total, lse = exponentials(scores)
    return mass / total, lse


def weighted_sum(
    weights: Float[Array, "*B H N M"], value: Float[Array, "*B M G Dv"], dtype: Any = None
) -> Float[Array, "*B N H Dv"]:
    """The values averaged by the weights, multiplied in the values' dtype; the result has `dtype` (the same)."""
    *batch, heads, num_queries, num_keys = weights.shape
    groups, width = value.shape[-2:]
    weights = weights.astype(value.dtype)
    weights = weights.reshape(*batch, groups, heads // groups * num_queries, num_keys)
    out = jnp.einsum("...hnm,...mhd->...nhd", weights, value, preferred_element_type=dtype or value.dtype)
    out = jnp.moveaxis(out.reshape(*batch, heads // groups, num_queries, groups, width), -4, -2)
    return out.reshape(*batch, num_queries, heads, width)


def attend(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    value: Float[Array, "*B M G Dv"],
    *,
    bias: Float[Array, "..."] | None,
    mask: Mask,
    scale: Any,
    logits_soft_cap: float | None,
    dropout_rate: float,
    dropout_rng: Any,
) -> tuple[Float[Array, "*B N H Dv"], Float[Array, "*B H N"]]:
    """`dot_product_attention` with the score matrix in memory; inputs keep their dtype in both products."""
    weights, lse = softmax(
        dot_scores(
            query,
            key,
            scale=scale,
            bias=bias,
            mask=mask.block(0, query.shape[-3], 0, key.shape[-3]),
            logits_soft_cap=logits_soft_cap,
        )
    )
    if dropout_rate:
        weights = dropout.drop_all(weights, dropout_rng, dropout_rate)
    return weighted_sum(weights, value), lse
