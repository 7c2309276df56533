"""Attention of few queries over many inputs that does not project the inputs: the kernels move to the short side.

    scores:  q . (W_k x + b_k) = (W_k^T q, q . b_k) . (x, 1)
    output:  sum_j p_j (W_v x_j + b_v) = (W_v, b_v) sum_j p_j (x_j, 1)

Keys and values are both (x, 1), one head of width C + 1 for the heads of all queries. The one carries the biases
through soft caps, dropped weights, which do not sum to 1, and queries without keys. A LayerNorm before the projections
is affine after its division: scale and bias go into the kernels, and only (x - mean) / std is left, which is done in
each chunk.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from xattn.ops.attention import chunked
from xattn.ops.attention.api import checked_mask, dot_product_attention
from xattn.ops.attention.masks import Mask


class Affine(NamedTuple):
    """x -> x kernel + bias, from C channels to G heads of width D: kernel [C, G, D], bias [G, D] or None."""

    kernel: Any
    bias: Any = None


class Norm(NamedTuple):
    """x -> (x - mean) / sqrt(var + epsilon) scale + bias over C channels: scale and bias [C] or None."""

    scale: Any
    bias: Any
    epsilon: float


FOLDING_ROWS = 50
"""Moving the kernels takes as long as projecting about this many inputs (measured on a CPU, 768 and 1024 channels)."""
CHUNKED_FROM = 2**23
"""Bytes of scores from which on chunks are faster here, where a chunk makes its keys and values (measured on a CPU)."""
MARGIN = 0.75
"""Of the multiply-adds of projecting: with more than this, absorbing was not faster (measured on a CPU)."""


def absorbing_pays(
    batch: int,
    num_queries: int,
    num_keys: int,
    channels: int,
    num_heads: int,
    num_kv_heads: int,
    width: int,
    v_width: int,
) -> bool:
    """Whether `absorbed_attention` is the faster one, by multiply-adds, and takes no more memory.

    Queries and outputs of width C + 1 must not be larger than the keys and values that they spare.
    """
    widths = width + v_width
    kernels = channels * num_kv_heads * widths
    projecting = batch * num_keys * (kernels + num_queries * num_heads * widths)
    absorbing = batch * num_queries * num_heads * (channels + 1) * (widths + 2 * num_keys)
    fits = 2 * num_queries * num_heads * (channels + 1) <= num_keys * num_kv_heads * widths
    return fits and absorbing + FOLDING_ROWS * kernels < MARGIN * projecting


def absorbed_attention(
    query: Float[Array, "*B N H D"],
    inputs: Float[Array, "*B M C"],
    key: Affine,
    value: Affine,
    *,
    norm: Norm | None = None,
    mask: Bool[Array, "..."] | Mask | None = None,
    bias: Float[Array, "..."] | None = None,
    scale: float | Float[Array, "..."] | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | None = None,
) -> Float[Array, "*B N H Dv"]:
    """`dot_product_attention(query, key(norm(inputs)), value(norm(inputs)))` without these keys and values.

    Args:
      query: [*B, N, H, D].
      inputs: [*B, M, C].
      key, value: the projections, to G heads; G divides H.
      norm: a LayerNorm before both of them.
      mask, bias, scale, logits_soft_cap, dropout_rate, dropout_rng: as in `dot_product_attention`.

    Returns:
      [*B, N, H, Dv] in the dtype of `query`.

    Raises:
      ValueError: if shapes do not fit.
    """
    *batch, _, heads, width = query.shape
    groups = key.kernel.shape[-2]
    if tuple(batch) != inputs.shape[:-2]:
        raise ValueError(f"query {query.shape} and inputs {inputs.shape} must have the same leading axes.")
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key heads: make it a divisor.")
    dtype, wide = query.dtype, jnp.promote_types(query.dtype, jnp.float32)
    to_keys, to_values = (_one_kernel(affine, norm, heads // groups).astype(dtype) for affine in (key, value))
    query = jnp.einsum("...nhd,chd->...nhc", query, to_keys, preferred_element_type=wide).astype(dtype)
    epsilon = None if norm is None else norm.epsilon

    def prepare(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = _with_one(x, dtype, epsilon)
        return rows, rows

    options: dict[str, Any] = {
        "bias": bias,
        "scale": width**-0.5 if scale is None else scale,
        "logits_soft_cap": logits_soft_cap,
        "dropout_rate": dropout_rate,
        "dropout_rng": dropout_rng,
    }
    rows, _ = jax.eval_shape(prepare, inputs)
    if chunked.large_scores(query, rows, CHUNKED_FROM):
        checked = checked_mask(query, rows, rows, bias, mask, scale, dropout_rate, dropout_rng)
        # Products with as many columns as the inputs have channels prefer blocks of one size (measured on a CPU).
        size = None if jax.default_backend() == "gpu" else chunked.KEY_CHUNK
        out, _ = chunked.attend_prepared(query, (inputs,), prepare, mask=checked, key_chunk_size=size, **options)
    else:
        out = dot_product_attention(query, *prepare(inputs), mask=mask, **options)
    return jnp.einsum("...nhc,chd->...nhd", out, to_values, preferred_element_type=wide).astype(dtype)


def _one_kernel(affine: Affine, norm: Norm | None, repeats: int) -> jax.Array:
    """The kernel [C + 1, H, D] of x -> affine(norm(x)) on (the normalised x, 1)."""
    kernel, bias = affine
    bias = jnp.zeros(kernel.shape[1:], kernel.dtype) if bias is None else bias
    if norm is not None and norm.bias is not None:
        bias = bias + jnp.einsum("c,chd->hd", norm.bias, kernel)
    if norm is not None and norm.scale is not None:
        kernel = norm.scale[:, None, None] * kernel
    return jnp.repeat(jnp.concatenate([kernel, bias[None]]), repeats, axis=1)


def _with_one(x: jax.Array, dtype: Any, epsilon: float | None) -> jax.Array:
    """x [*B, M, C], normalised over C unless epsilon is None, then a one: [*B, M, 1, C + 1], one head."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if epsilon is not None:
        centred = wide - wide.mean(-1, keepdims=True)
        wide = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return jnp.concatenate([wide, jnp.ones((*wide.shape[:-1], 1), wide.dtype)], -1)[..., None, :].astype(dtype)
