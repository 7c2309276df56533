"""Attention by cuDNN's fused kernel on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from xattn.ops.attention.chunked import large_scores, score_bytes
from xattn.ops.attention.distributed import split_axes
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
        return "it needs an NVIDIA GPU of the generation Ampere or a later one"
    if query.dtype not in (jnp.bfloat16, jnp.float16) or not query.dtype == key.dtype == value.dtype:
        dtypes = sorted({str(x.dtype) for x in (query, key, value)})
        return f"arrays must all be bfloat16, or all float16, not {' and '.join(dtypes)}"
    width, v_width = query.shape[-1], value.shape[-1]
    if width != v_width or width % 8 or width > widest:
        return f"heads of {width} and {v_width} must be of one width, a multiple of 8 up to {widest}"
    num_queries, num_keys = query.shape[-3], key.shape[-3]
    if 0 in (*query.shape, num_keys):
        return "there is nothing to attend from or to"
    if bias is not None and bias.dtype != query.dtype:
        return f"a bias of {bias.dtype} would be rounded to {query.dtype}"
    if not (bias is None and _is_own(mask, num_queries, num_keys)):
        if large_scores(query, key):
            return f"a bias or a mask of {num_queries} x {num_keys} would take much memory"
        if (num_keys + num_keys % 2) % 128 == 64:
            # github.com/pytorch/pytorch/issues/196678: where a row's log-sum-exp is below -88.
            return f"with a bias or a mask its gradient may be NaN for {num_keys} keys, 64 beyond a multiple of 128"
    if not isinstance(scale, int | float):
        return "the scale must be a number"
    if logits_soft_cap is not None:
        return "it has no soft cap"
    if dropout_rate:
        return "it does not drop the weights that the contract names"
    return None


FROM = 2**20
"""Bytes of the float32 scores from which on it is known to be faster than XLA's own programs (on an H200)."""
FEWEST = 32
"""The same of queries and of keys."""


def unasked(query: Any, key: Any, bias: Any, mask: Mask) -> str | None:
    """Why the kernel, which can serve, is not taken unless it is asked for; None if it is."""
    num_queries, num_keys = query.shape[-3], key.shape[-3]
    if not (bias is None and _is_own(mask, num_queries, num_keys)):
        return "a bias, and a mask that it does not know, need implementation='fused': jax.vmap fails with them"
    if min(num_queries, num_keys) < FEWEST or score_bytes(query, key) < FROM:
        return "few queries, few keys and few scores need implementation='fused'"
    if not _is_split_by_batch_and_heads(query, key):
        return "on a mesh that does not split batch and heads alone, and evenly, it needs implementation='fused'"
    if jax.__version_info__ < (0, 11, 1):
        return "before jax 0.11.1 it needs implementation='fused': gradients under jax.vmap fail"
    return None


def _is_split_by_batch_and_heads(query: Any, key: Any) -> bool:
    """Whether each device of the mesh in use, if any, has its own part of the batch and of the heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1  # else arrays may be split in any way
    if mesh.are_all_axes_manual:
        return True
    batch, heads = split_axes(math.prod(query.shape[:-3]), query.shape[-2], key.shape[-2])
    parts = math.prod(mesh.shape[axis] for axis in (*(batch or ()), *(heads or ())))
    return mesh.are_all_axes_auto and parts == mesh.size


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
    [B, H or 1, N, M]. jax refuses gradients of odd lengths: one more row is added to them, and hidden. Differentiable
    in reverse mode.
    """
    *batch, num_queries, num_heads, width = query.shape
    num_keys = key.shape[-3]
    rows = math.prod(batch)
    own = bias is None and _is_own(mask, num_queries, num_keys)
    causal = own and mask.upper is not None
    allowed = some = lengths = None
    if not own:
        scores = (*batch, num_heads, num_queries, num_keys)
        allowed = mask.as_array(num_queries, num_keys)
        if bias is not None:
            # The kernel has no infinities, and adds its own large number where it masks: the mask says all of it.
            allowed &= bias > -jnp.inf
            bias = jnp.where(allowed, bias, 0)
            bias = jnp.broadcast_to(bias, scores).reshape(rows, *scores[-3:])
        heads = num_heads if allowed.ndim > 2 and allowed.shape[-3] > 1 else 1
        allowed = jnp.broadcast_to(allowed, (*batch, heads, num_queries, num_keys))
        some = jnp.moveaxis(allowed.any(-1), -2, -1)[..., None]
        allowed = allowed.reshape(rows, heads, num_queries, num_keys)
    elif num_keys % 2 and not causal:
        lengths = jnp.full(rows, num_keys, jnp.int32)

    def kernel(query: Any, key: Any, value: Any, bias: Any, allowed: Any, lengths: Any) -> jax.Array:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            allowed,
            scale=float(scale),
            is_causal=causal,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )

    # In two steps, so that an axis that jax.vmap maps comes first, where jax's kernel wants it.
    query, key, value = (
        _evened(x.reshape(-1, *x.shape[-2:]).reshape(rows, *x.shape[-3:]), -3) for x in (query, key, value)
    )
    bias, allowed = (None if x is None else _evened(_evened(x, -1), -2) for x in (bias, allowed))
    out = _over_mesh(kernel, query, key, value, bias, allowed, lengths)[:, :num_queries]
    out = out.reshape(*batch, num_queries, num_heads, width)
    # Of a row without keys the kernel gives the mean of all values.
    return out if some is None else jnp.where(some, out, 0), None


def _evened(x: jax.Array, axis: int) -> jax.Array:
    """`x` with a last entry of zeros where the length of an axis is odd."""
    if x.shape[axis] % 2 == 0:
        return x
    odd = [(0, 0)] * x.ndim
    odd[axis] = (0, 1)
    return jnp.pad(x, odd)


def _over_mesh(kernel: Any, query: Any, key: Any, value: Any, bias: Any, allowed: Any, lengths: Any) -> jax.Array:
    """The kernel on each device of the mesh, with its part of the batch and of the heads.

    Left to jax's own partitioning, grouped heads would meet others' keys and masks would keep their whole batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return kernel(query, key, value, bias, allowed, lengths)
    batch, heads = split_axes(query.shape[0], query.shape[2], key.shape[2])
    split = PartitionSpec(batch, None, heads)
    pairs = (None if x is None else PartitionSpec(batch, heads if x.shape[1] > 1 else None) for x in (bias, allowed))
    specs = (split, split, split, *pairs, None if lengths is None else PartitionSpec(batch))
    return jax.shard_map(kernel, in_specs=specs, out_specs=split, check_vma=False)(
        query, key, value, bias, allowed, lengths
    )


def _is_own(mask: Mask, num_queries: int, num_keys: int) -> bool:
    """Whether the kernel knows a mask: none, or a causal one between equal lengths."""
    if mask.segments or any(part is not None for part in (mask.q_mask, mask.kv_mask, mask.lower, mask.dense)):
        return False
    return mask.upper is None or (isinstance(mask.upper, int) and mask.upper == 0 and num_queries == num_keys)


def _widest_head() -> int | None:
    """The widest head that the kernel takes on the default device (256 on Hopper, 128 on others), or None."""
    config: Any = jax.config
    chosen = config.jax_default_device  # None, a device or the name of a platform
    if jax.default_backend() != "gpu" or getattr(chosen, "platform", chosen) == "cpu":
        return None
    if "cuda" not in jax.extend.backend.get_backend().platform_version:
        return None
    generation = int(jax.devices()[0].compute_capability.split(".")[0])
    return None if generation < 8 else 256 if generation == 9 else 128
