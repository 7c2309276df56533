"""Attention of few queries over many inputs that does not project the inputs: the kernels move to the short side.

    scores:  q . (W_k x + b_k) = (W_k^T q, q . b_k) . (x, 1)
    output:  sum_j p_j (W_v x_j + b_v) = (W_v, b_v) sum_j p_j (x_j, 1)

Keys and values are both y = (x, 1), one head for all queries' heads, so N M H C multiply-adds take the place of
M C H D, exactly. A LayerNorm before the projections is affine after its division: scale and bias go into the
kernels, and only (x - mean) / std is left, which is done in each chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xattn.ops.attention import chunked
from xattn.ops.attention.api import checked_mask, dot_product_attention, large_scores


class Affine(NamedTuple):
    """x -> x kernel + bias, from C channels to G heads of width D: kernel [C, G, D], bias [G, D] or None."""

    kernel: Any
    bias: Any = None


class Norm(NamedTuple):
    """x -> (x - mean) / sqrt(var + epsilon) scale + bias over C channels: scale [C], bias [C]."""

    scale: Any
    bias: Any
    epsilon: float


def absorbing_pays(
    num_queries: int, num_keys: int, channels: int, num_heads: int, num_kv_heads: int, width: int, v_width: int
) -> bool:
    """Whether `absorbed_attention` takes fewer multiply-adds than projecting the inputs and attending to them."""
    widths = width + v_width
    projecting = num_keys * widths * (channels * num_kv_heads + num_queries * num_heads)
    absorbing = num_queries * num_heads * (channels + 1) * (widths + 2 * num_keys)
    return absorbing < projecting


def absorbed_attention(
    query: Float[Array, "*B N H D"],
    inputs: Float[Array, "*B M C"],
    key: Affine,
    value: Affine,
    *,
    norm: Norm | None = None,
    mask: Any = None,
    bias: Float[Array, "..."] | None = None,
    scale: float | Float[Array, "..."] | None = None,
    **options: Any,
) -> Float[Array, "*B N H Dv"]:
    """`dot_product_attention(query, key(norm(inputs)), value(norm(inputs)))` without these keys and values.

    Args:
      query: [*B, N, H, D].
      inputs: [*B, M, C].
      key, value: the projections.
      norm: a LayerNorm before both of them.
      mask, bias, scale: as in `dot_product_attention`.
      **options: `logits_soft_cap`, `dropout_rate` and `dropout_rng` of `dot_product_attention`.

    Returns:
      [*B, N, H, Dv] in the dtype of `query`.

    Raises:
      ValueError: if shapes do not fit.
    """
    dtype, width = query.dtype, query.shape[-1]
    repeats = query.shape[-2] // key.kernel.shape[-2]
    to_keys, to_values = (_one_kernel(affine, norm, repeats).astype(dtype) for affine in (key, value))
    query = jnp.einsum("...nhd,chd->...nhc", query, to_keys, preferred_element_type=jnp.float32).astype(dtype)
    prepare = functools.partial(_with_one, dtype=dtype, epsilon=None if norm is None else norm.epsilon)
    options |= {"bias": bias, "scale": width**-0.5 if scale is None else scale}
    shared = jax.eval_shape(prepare, inputs)
    if large_scores(query, shared):
        options = {"logits_soft_cap": None, "dropout_rate": 0.0, "dropout_rng": None} | options
        mask = checked_mask(query, shared, shared, bias, mask, scale, options["dropout_rate"], options["dropout_rng"])

        def prepare_both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows = prepare(x)
            return rows, rows

        out, _ = chunked.attend_to(query, (inputs,), prepare_both, mask=mask, **options)
    else:
        shared = prepare(inputs)
        out = dot_product_attention(query, shared, shared, mask=mask, **options)
    return jnp.einsum("...nhc,chd->...nhd", out, to_values, preferred_element_type=jnp.float32).astype(dtype)


def _one_kernel(affine: Affine, norm: Norm | None, repeats: int) -> jax.Array:
    """The kernel [C + 1, H, D] of x -> affine(norm(x)) on (the normalised x, 1)."""
    kernel, bias = affine
    bias = jnp.zeros(kernel.shape[1:], kernel.dtype) if bias is None else bias
    if norm is not None:
        bias = bias + jnp.einsum("c,chd->hd", norm.bias, kernel)
        kernel = norm.scale[:, None, None] * kernel
    return jnp.repeat(jnp.concatenate([kernel, bias[None]]), repeats, axis=1)


def _with_one(x: jax.Array, dtype: Any, epsilon: float | None) -> jax.Array:
    """x [*B, M, C], normalised over C unless epsilon is None, then a one: [*B, M, 1, C + 1], one head."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if epsilon is not None:
        centred = wide - wide.mean(-1, keepdims=True)
        wide = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return jnp.concatenate([wide, jnp.ones((*wide.shape[:-1], 1), wide.dtype)], -1)[..., None, :].astype(dtype)
