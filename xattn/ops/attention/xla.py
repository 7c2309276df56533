"""Dense attention: the whole score matrix at once, left to XLA to fuse."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xattn.ops.attention import dropout
from xattn.ops.attention.masks import Mask
from xattn.ops.products import einsum


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
    scale = jnp.asarray(scale, dtype)[..., None, None]
    query = jnp.moveaxis(query, -2, -3)
    if query.dtype == dtype:  # the queries are fewer numbers than the scores
        query, scale = query * scale, None
    # Heads that share a key head are next to each other: they become more queries of it.
    query = query.reshape(*batch, groups, heads // groups * num_queries, width)
    key = jnp.moveaxis(key, -2, -3)
    scores = einsum("...nd,...md->...nm", query, key, dtype)
    scores = scores.reshape(*batch, heads, num_queries, key.shape[-2])
    if scale is not None:
        scores = scores * scale
    return cap_bias_mask(scores, bias=bias, mask=mask, logits_soft_cap=logits_soft_cap)


def exponentials(
    scores: Float[Array, "*B H N M"],
) -> tuple[Float[Array, "*B H N M"], Float[Array, "*B H N 1"], Float[Array, "*B H N"]]:
    """e^(s - max) for each key, what its row must be divided by (the sum, if it is not 0), and the log-sum-exp.

    A row of -inf gives 0, a number above 0, and -inf.
    """
    # Bounds instead of `where` leave a chain that XLA's CPU backend fuses with the products around it. A row with
    # a key sums to 1 or more.
    lowest = jnp.finfo(scores.dtype).min
    shift = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=lowest))
    mass = jnp.exp(scores - shift)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    some = jnp.maximum(total, 0.5)
    lse = jnp.where(total == 0, -jnp.inf, shift + jnp.log(some))
    return mass, some, lse[..., 0]


@jax.custom_jvp
def softmax(scores: Float[Array, "*B H N M"]) -> tuple[Float[Array, "*B H N M"], Float[Array, "*B H N"]]:
    """Softmax over the keys and the log-sum-exp; a row of -inf gives weights 0 and -inf."""
    mass, total, lse = exponentials(scores)
    return mass / total, lse


@softmax.defjvp
def _softmax_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Any, Any]:
    # From the weights alone, so that a backward pass keeps one array of this size and not three.
    weights, lse = softmax(*primals)
    change = jnp.sum(weights * tangents[0], axis=-1, keepdims=True)
    return (weights, lse), (weights * (tangents[0] - change), change[..., 0])


def weighted_sum(
    weights: Float[Array, "*B H N M"], value: Float[Array, "*B M G Dv"], dtype: Any = None
) -> Float[Array, "*B N H Dv"]:
    """The values averaged by the weights, multiplied in the values' dtype; the result has `dtype` (the same)."""
    *batch, heads, num_queries, num_keys = weights.shape
    groups, width = value.shape[-2:]
    weights = weights.astype(value.dtype).reshape(*batch, groups, heads // groups * num_queries, num_keys)
    out = einsum("...nm,...md->...nd", weights, jnp.moveaxis(value, -2, -3), dtype)
    return jnp.moveaxis(out.reshape(*batch, heads, num_queries, width), -3, -2)


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
