"""Attention by the splash kernel of Pallas on TPUs: blocks of the score matrix, and none that a mask leaves empty."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from xattn.ops.attention.distributed import split_axes
from xattn.ops.attention.masks import Mask

LANES = 128
"""What lengths and widths must be multiples of."""
BLOCKS = (512, 256, 128)
"""Queries and keys of a block: the first that divides their number."""
INTERPRET = False
"""Whether to run the kernel step by step on a CPU, for tests."""

_NO_QUERY, _NO_KEY = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max  # segments of padding, which see nothing


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
    if not INTERPRET and jax.default_backend() != "tpu":
        return "it needs a TPU"
    sizes = (query.shape[-3], key.shape[-3], query.shape[-1], value.shape[-1])
    if any(size % LANES or size == 0 for size in sizes):
        return "{} queries, {} keys and heads of {} and {} must be multiples of {}".format(*sizes, LANES)
    if query.dtype not in (jnp.bfloat16, jnp.float32) or not query.dtype == key.dtype == value.dtype:
        dtypes = sorted({str(x.dtype) for x in (query, key, value)})
        return f"arrays must all be bfloat16, or all float32, not {' and '.join(dtypes)}"
    if bias is not None:
        return "it takes no bias"
    if dropout_rate:
        return "it does not drop weights"
    bounds = (bound for bound in (mask.lower, mask.upper) if bound is not None)
    if mask.dense is not None or len(mask.segments) > 1 or not all(isinstance(bound, int) for bound in bounds):
        return "it takes windows of constants, padding and one pair of segments, and no other mask"
    lowest = -sizes[0] if mask.lower is None else mask.lower
    highest = sizes[1] if mask.upper is None else mask.upper
    if max(lowest, 1 - sizes[0]) > min(highest, sizes[1] - 1):
        return "the window allows nothing"
    return None


def attend(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    value: Float[Array, "*B M G Dv"],
    *,
    bias: None,
    mask: Mask,
    scale: Any,
    logits_soft_cap: float | None,
    dropout_rate: float,
    dropout_rng: Any,
) -> tuple[Float[Array, "*B N H Dv"], None]:
    """`dot_product_attention` of what `unfit` has nothing against; its log-sum-exp is not given out.

    On a mesh each device has its rows of the batch and its heads, where the mesh divides them. Differentiable in
    reverse mode.
    """
    *batch, num_queries, num_heads, width = query.shape
    num_keys = key.shape[-3]
    rows = math.prod(batch)

    def segments(ids: Any, real: Any, length: int, padding: int) -> jax.Array:
        ids = jnp.zeros((), jnp.int32) if ids is None else ids
        ids = ids if real is None else jnp.where(real, ids, padding)
        return jnp.broadcast_to(ids, (*batch, length)).reshape(rows, length).astype(jnp.int32)

    pair = mask.segments[0] if mask.segments else (None, None)
    ids = None
    if mask.segments or mask.q_mask is not None or mask.kv_mask is not None:
        ids = kernels.SegmentIds(
            segments(pair[0], mask.q_mask, num_queries, _NO_QUERY), segments(pair[1], mask.kv_mask, num_keys, _NO_KEY)
        )
    scaled = (query * jnp.asarray(scale, jnp.float32).reshape(-1, 1)).astype(query.dtype)
    scaled, key, value = (x.reshape(rows, *x.shape[-3:]).swapaxes(1, 2) for x in (scaled, key, value))
    out = _over_mesh((mask.lower, mask.upper), logits_soft_cap, scaled, key, value, ids)
    out = out.swapaxes(1, 2).reshape(*batch, num_queries, num_heads, -1)
    block = mask.block(0, num_queries, 0, num_keys)
    if block is None:
        return out, None
    # A row without keys is not zero in the kernel.
    some = jnp.broadcast_to(block, (*batch, 1, num_queries, num_keys)).any(-1).swapaxes(-1, -2)[..., None]
    return jnp.where(some, out, 0), None


def _over_mesh(
    bounds: tuple[int | None, int | None], logits_soft_cap: float | None, query: Any, key: Any, value: Any, ids: Any
) -> jax.Array:
    """The kernel on arrays [B, H, length, D], on each device of the mesh with its part of them."""
    on_device = functools.partial(_on_device, bounds, logits_soft_cap)
    if jax.sharding.get_abstract_mesh().empty:
        return on_device(query, key, value, ids)
    batch, heads = split_axes(query.shape[0], query.shape[1], key.shape[1])
    split = PartitionSpec(batch, heads)
    return jax.shard_map(
        on_device, in_specs=(split, split, split, PartitionSpec(batch)), out_specs=split, check_vma=False
    )(query, key, value, ids)


def _on_device(
    bounds: tuple[int | None, int | None], logits_soft_cap: float | None, query: Any, key: Any, value: Any, ids: Any
) -> jax.Array:
    heads, num_queries, num_keys = query.shape[1], query.shape[2], key.shape[2]
    lower, upper = bounds
    shape = (num_queries, num_keys)
    windowed = lower is not None or upper is not None
    window = (
        masks.LocalMask(shape, (None if lower is None else -lower, upper), 0) if windowed else masks.FullMask(shape)
    )
    block_q, block_kv = (next(size for size in BLOCKS if length % size == 0) for length in shape)
    kernel: Any = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([window] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        attn_logits_soft_cap=logits_soft_cap,
        interpret=INTERPRET,
    )
    return jax.vmap(kernel)(query, key, value, ids)
