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
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    heads, groups = query.shape[-2], key.shape[-2]
    query = query.reshape(*query.shape[:-2], groups, heads // groups, query.shape[-1])
    scores = jnp.einsum("...ngrd,...mgd->...grnm", query, key, preferred_element_type=dtype)
    scores = scores.reshape(*scores.shape[:-4], heads, *scores.shape[-2:])
    scores = scores * jnp.asarray(scale, dtype)[..., None, None]
    return cap_bias_mask(scores, bias=bias, mask=mask, logits_soft_cap=logits_soft_cap)


def softmax(scores: Float[Array, "*B H N M"]) -> tuple[Float[Array, "*B H N M"], Float[Array, "*B H N"]]:
    """Softmax over the keys and the log-sum-exp; a row of -inf gives weights 0 and -inf."""
    shift = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf))
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    mass = jnp.exp(scores - shift)
    total = jnp.sum(mass, axis=-1, keepdims=True)
    some = jnp.where(total == 0, 1, total)
    lse = jnp.where(total == 0, -jnp.inf, shift + jnp.log(some))
    return mass / some, lse[..., 0]


def weighted_sum(
    weights: Float[Array, "*B H N M"], value: Float[Array, "*B M G Dv"], dtype: Any = None
) -> Float[Array, "*B N H Dv"]:
    """The values averaged by the weights, multiplied in the values' dtype; the result has `dtype` (the same)."""
    heads, groups = weights.shape[-3], value.shape[-2]
    weights = weights.astype(value.dtype)
    weights = weights.reshape(*weights.shape[:-3], groups, heads // groups, *weights.shape[-2:])
    out = jnp.einsum("...grnm,...mgd->...ngrd", weights, value, preferred_element_type=dtype or value.dtype)
    return out.reshape(*out.shape[:-3], heads, out.shape[-1])


def attend(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    value: Float[Array, "*B M G Dv"],
    *,
    bias: Float[Array, "..."] | None,
    mask: Mask | None,
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
            mask=None if mask is None else mask.as_array(query.shape[-3], key.shape[-3]),
            logits_soft_cap=logits_soft_cap,
        )
    )
    if dropout_rate:
        weights = dropout.drop_all(weights, dropout_rng, dropout_rate)
    return weighted_sum(weights, value), lse
