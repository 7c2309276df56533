"""Attention by cuDNN's fused kernel on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Float

from xattn.ops.attention.masks import Mask


def unfit(
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any,
    mask: Mask,
    scale: Any,
    logits_soft_cap: float | None,
    dropout_rate: float,
) -> str | None:
    """Why the kernel cannot compute `attend` of these arguments on the default device; None if it can."""
    widest = _widest_head()
    if widest is None:
        return "it needs an NVIDIA GPU"
    if query.dtype not in (jnp.bfloat16, jnp.float16) or not query.dtype == key.dtype == value.dtype:
        dtypes = sorted({str(x.dtype) for x in (query, key, value)})
        return f"arrays must all be bfloat16, or all float16, not {' and '.join(dtypes)}"
    width, v_width = query.shape[-1], value.shape[-1]
    if width != v_width or width % 8 or width > widest:
        return f"heads of {width} and {v_width} must be of one width, a multiple of 8 up to {widest}"
    num_queries, num_keys = query.shape[-3], key.shape[-3]
    if 0 in (*query.shape, num_keys):
        return "there is nothing to attend from or to"
    if num_queries % 2 or num_keys % 2:
        return f"{num_queries} queries and {num_keys} keys must both be even, or jax refuses their gradient"
    if not isinstance(scale, int | float):
        return "the scale must be a number"
    if logits_soft_cap is not None:
        return "it has no soft cap"
    if dropout_rate:
        return "it does not drop the weights that the contract names"
    return None


def attend(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    value: Float[Array, "*B M G D"],
    *,
    bias: Float[Array, "..."] | None,
    mask: Mask,
    scale: float,
    logits_soft_cap: float | None,
    dropout_rate: float,
    dropout_rng: Any,
) -> tuple[Float[Array, "*B N H D"], None]:
    """`dot_product_attention` of what `unfit` has nothing against; its log-sum-exp is not given out.

    A causal mask of equal lengths costs nothing. Any other mask, and a bias, are handed over as one array
    [B, H or 1, N, M]. Differentiable in reverse mode.
    """
    *batch, num_queries, num_heads, width = query.shape
    num_keys = key.shape[-3]
    rows = math.prod(batch)
    scores = (*batch, num_heads, num_queries, num_keys)
    own = bias is None and _is_own(mask, num_queries, num_keys)
    some = allowed = None
    if not own:
        allowed = mask.as_array(num_queries, num_keys)
        if bias is not None:
            # The kernel has no infinities: what the contract says of them is said by the mask.
            allowed &= bias > -jnp.inf
            bias = jnp.broadcast_to(jnp.where(bias > -jnp.inf, bias, 0), scores)
            bias = bias.reshape(rows, *scores[-3:]).astype(query.dtype)
        heads = num_heads if allowed.ndim > 2 and allowed.shape[-3] > 1 else 1
        allowed = jnp.broadcast_to(allowed, (*batch, heads, num_queries, num_keys))
        some = jnp.moveaxis(allowed.any(-1), -2, -1)[..., None]
        allowed = allowed.reshape(rows, heads, num_queries, num_keys)
    out = jax.nn.dot_product_attention(
        *(x.reshape(rows, *x.shape[-3:]) for x in (query, key, value)),
        bias=bias,
        mask=allowed,
        scale=float(scale),
        is_causal=own and mask.upper is not None,
        implementation="cudnn",
    ).reshape(*batch, num_queries, num_heads, width)
    # Of a row without keys the kernel gives the mean of all values.
    return out if some is None else jnp.where(some, out, 0), None


def _is_own(mask: Mask, num_queries: int, num_keys: int) -> bool:
    """Whether the kernel knows a mask: none, or a causal one between equal lengths."""
    if mask.segments or any(part is not None for part in (mask.q_mask, mask.kv_mask, mask.lower, mask.dense)):
        return False
    return mask.upper is None or (isinstance(mask.upper, int) and mask.upper == 0 and num_queries == num_keys)


def _widest_head() -> int | None:
    """The widest head that the kernel takes on the default device (256 from Hopper on, 128 before); None without it."""
    if jax.default_backend() != "gpu" or "cuda" not in jax.extend.backend.get_backend().platform_version:
        return None
    return 256 if float(jax.devices()[0].compute_capability) >= 9 else 128
