"""The definition of attention that every other implementation is tested against."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xattn.ops.attention import dropout
from xattn.ops.attention.masks import Mask


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
    """Attention in float32 at the highest matmul precision, one line for each step.

    s = scale q k^T;  s = cap tanh(s / cap);  s = s + bias;  s = -inf where masked;
    p = softmax(s), 0 in a row without keys;  p = dropout(p);  o = p v;  lse = log sum exp s.

    The arguments are those of `xattn.ops.attention.dot_product_attention`.
    """
    highest = jax.lax.Precision.HIGHEST
    num_queries, num_heads = query.shape[-3:-1]
    num_keys, num_kv_heads = key.shape[-3:-1]
    q, k, v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (query, key, value))
    k, v = (jnp.repeat(x, num_heads // num_kv_heads, axis=-2) for x in (k, v))

    scores = jnp.einsum("...nhd,...mhd->...hnm", q, k, precision=highest)
    scores = scores * jnp.asarray(scale, q.dtype)[..., None, None]
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(mask.as_array(num_queries, num_keys), scores, -jnp.inf)

    empty = jnp.all(scores == -jnp.inf, axis=-1)
    # Softmax of a row of -inf is NaN, and so is its gradient: such rows are computed as zeros.
    finite = jnp.where(empty[..., None], 0, scores)
    weights = jnp.where(empty[..., None], 0, jax.nn.softmax(finite, axis=-1))
    lse = jnp.where(empty, -jnp.inf, jax.nn.logsumexp(finite, axis=-1))
    if dropout_rate:
        weights = dropout.drop_all(weights, dropout_rng, dropout_rate)
    out = jnp.einsum("...hnm,...mhd->...nhd", weights, v, precision=highest)
    return out.astype(value.dtype), lse
