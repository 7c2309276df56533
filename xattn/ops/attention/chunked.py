"""Attention in blocks of the score matrix: exact, and the whole matrix never exists.

Forward: the results over chunks of keys are joined by `merge` (online softmax). Backward: each block is
computed again from the log-sum-exp, so nothing of size [N, M] is kept (arXiv 2205.14135, section 3). Chunks
are sliced from the arrays as given, without padding; a last, shorter chunk has its own static shape.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from xattn.ops.attention import dropout
from xattn.ops.attention.masks import Mask, take
from xattn.ops.attention.merge import merge
from xattn.ops.attention.xla import dot_scores, exponentials, weighted_sum

Prepare = Callable[..., tuple[jax.Array, jax.Array]]
"""Keys [*B, m, G, D] and values [*B, m, G, Dv] of a chunk, from that chunk of each input."""

KEY_CHUNK = 256
"""Up to so many keys are one block."""
CACHED_BYTES = 2**22
"""Half as many keys are a block if their float32 scores then take no more (measured: a CPU's caches hold them)..."""
STEP_BYTES = 2**19
"""... and no less: a loop's step has its price too."""
FORWARD_BYTES = 2**21
"""A forward pass doubles its keys while they, their values and their scores, as float32, take no more (measured)."""
BLOCK_BYTES = 2**26
"""What the scores of a block take at most; on a GPU also at least: each block costs 23 us there (an H200)."""
GPU_CHUNK = 2**15
"""Keys of a block on a GPU at most."""

CHUNKED_FROM = 2**24
"""Bytes of the float32 score matrix (all batch entries and heads) from which on chunks are used."""
CHUNKED_FROM_ON_GPU = 2**27
"""The same on a GPU, where they are slower, and spare memory."""


def large_scores(query: Any, key: Any, size: int = CHUNKED_FROM) -> bool:
    """Whether the scores of query [*B, N, H, D] and key [*B, M, G, D] are better never held whole.

    That is from `size` bytes on; on a GPU from `CHUNKED_FROM_ON_GPU`.
    """
    size = CHUNKED_FROM_ON_GPU if jax.default_backend() == "gpu" else size
    return score_bytes(query, key) >= size and key.shape[-3] >= KEY_CHUNK


def score_bytes(query: Any, key: Any) -> int:
    """What the float32 scores of query [*B, N, H, D] and key [*B, M, G, D] take."""
    *batch, num_queries, num_heads, _ = query.shape
    return 4 * math.prod(batch) * num_heads * num_queries * key.shape[-3]


class Settings(NamedTuple):
    """What a program is compiled for, besides shapes."""

    query_chunk: int
    forward_key_chunk: int
    backward_key_chunk: int
    logits_soft_cap: float | None
    dropout_rate: float
    prepare: Prepare
    out_dtype: Any

    def scores(self, q: Any, k: Any, scale: Any, bias: Any, mask: Any) -> jax.Array:
        return dot_scores(q, k, scale=scale, bias=bias, mask=mask, logits_soft_cap=self.logits_soft_cap)

    def drop(self, weights: jax.Array, drops: Any) -> jax.Array:
        return weights if drops is None else dropout.drop(weights, drops.rows, drops.columns, self.dropout_rate)


class Drops(NamedTuple):
    """What decides which weights drop: words for each row of weights, and the index of each key, int [M]."""

    rows: dropout.RowKeys
    columns: Any

    def part(self, n: Any, height: int, m: Any, width: int) -> "Drops":
        """That of queries n .. n + height - 1 and keys m .. m + width - 1."""
        first, second = (take(x, n, height, -1) for x in self.rows)
        return Drops((first, second), take(self.columns, m, width, -1))


def attend(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    value: Float[Array, "*B M G Dv"],
    **options: Any,
) -> tuple[Float[Array, "*B N H Dv"], Float[Array, "*B H N"]]:
    """`dot_product_attention` in memory O(N + M + block); the options are those of `attend_prepared`."""
    return attend_prepared(query, (key, value), lambda key, value: (key, value), **options)


def attend_prepared(
    query: Float[Array, "*B N H D"],
    inputs: tuple[Float[Array, "..."], ...],
    prepare: Prepare,
    *,
    bias: Float[Array, "..."] | None,
    mask: Mask,
    scale: Any,
    logits_soft_cap: float | None,
    dropout_rate: float,
    dropout_rng: Any,
    query_chunk_size: int | None = None,
    key_chunk_size: int | None = None,
) -> tuple[Float[Array, "*B N H Dv"], Float[Array, "*B H N"]]:
    """Attention over keys and values that are made from `inputs` a chunk at a time.

    A block is query_chunk_size x key_chunk_size scores for every batch entry and head. Left out, a block has 128 keys
    if the float32 scores of its queries then take 512 KiB to 4 MiB, otherwise 256; a forward pass doubles that as long
    as keys, values and scores take no more than 2 MiB. On a GPU a block has as many keys as keep the scores within
    64 MiB, 256 to 32768. It has all keys if they are 256 or fewer, and as many queries as keep it within 64 MiB, at
    least 128. Differentiable in reverse mode only.

    Args:
      query: as in `dot_product_attention`, like all options.
      inputs: arrays with one row a key, [*B, M, ...].
      prepare: makes the keys and values of a chunk, in each pass anew.
    """
    *batch, num_queries, num_heads, _ = query.shape
    key, value = jax.eval_shape(prepare, *inputs)
    sizes = block_size(query, key, value, query_chunk_size, key_chunk_size)
    settings = Settings(*sizes, logits_soft_cap, dropout_rate, prepare, value.dtype)
    scale = jnp.asarray(scale, jnp.promote_types(query.dtype, jnp.float32))
    drops = None
    if dropout_rate:
        rows = dropout.row_keys(dropout_rng, (*batch, num_heads, num_queries))
        drops = Drops(rows, jnp.arange(key.shape[-3]))
    bias = None if bias is None else jnp.atleast_2d(bias)
    return attend_in_blocks(settings, query, inputs, scale, bias, mask, drops)


def block_size(
    query: Any, key: Any, value: Any, query_chunk_size: int | None, key_chunk_size: int | None
) -> tuple[int, int, int]:
    """Queries of a block, and its keys forward and backward: those asked for, or the defaults of `attend_prepared`.

    Only the shapes matter of query [*B, N, H, D], key [*B, M, G, D] and value [*B, M, G, Dv].
    """
    *batch, num_queries, num_heads, _ = query.shape
    num_keys, groups, width = key.shape[-3:]
    row_bytes = 4 * max(1, math.prod(batch) * num_heads)
    forward = backward = key_chunk_size or KEY_CHUNK
    if key_chunk_size is None:
        half, a_key = KEY_CHUNK // 2, row_bytes * max(1, min(query_chunk_size or num_queries, num_queries))
        if jax.default_backend() == "gpu":
            forward = backward = min(max(KEY_CHUNK, BLOCK_BYTES // a_key // half * half), GPU_CHUNK)
        elif num_keys > KEY_CHUNK:
            forward = backward = half if STEP_BYTES <= half * a_key <= CACHED_BYTES else KEY_CHUNK
            with_rows = a_key + 4 * math.prod(batch) * groups * (width + value.shape[-1])
            while 2 * forward <= min(num_keys, FORWARD_BYTES // with_rows):
                forward *= 2
    forward, backward = (max(1, min(size, num_keys)) for size in (forward, backward))
    if query_chunk_size is None:
        query_chunk_size = max(128, BLOCK_BYTES // (row_bytes * forward))
    return max(1, min(query_chunk_size, num_queries)), forward, backward


def _chunks(length: int, size: int, body: Callable[[Any, Any, int], Any], carry: Any) -> Any:
    """`carry = body(carry, start, width)` over [0, length) in steps of `size`."""
    full, rest = divmod(length, size)
    if full == 1:
        carry = body(carry, 0, size)
    elif full:
        carry = lax.fori_loop(0, full, lambda i, carry: body(carry, i * size, size), carry)
    return body(carry, full * size, rest) if rest else carry


def _take_rows(inputs: tuple, row_axis: int, start: Any, size: int) -> tuple:
    return tuple(take(x, start, size, row_axis - x.ndim) for x in inputs)


def _put(x: jax.Array, update: jax.Array, start: Any, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, update.astype(x.dtype), start, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_in_blocks(
    settings: Settings, query: Any, inputs: Any, scale: Any, bias: Any, mask: Any, drops: Any
) -> tuple[jax.Array, jax.Array]:
    """`attend_prepared` with its arguments made ready: scale and bias [..., N, M] are arrays, `drops` a `Drops`."""
    *batch, num_queries, num_heads, _ = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    _, value = jax.eval_shape(settings.prepare, *inputs)

    def query_chunk(carry, n, height):
        out, lse = carry
        q = take(query, n, height, -3)

        def key_chunk(partial, m, width):
            k, v = settings.prepare(*_take_rows(inputs, len(batch), m, width))
            block = _block(bias, mask, drops, n, height, m, width)
            mass, total, lse = exponentials(settings.scores(q, k, scale, block.bias, block.mask))
            mass = settings.drop(mass, block.drops)
            # Divided as an output, which is smaller than the block of weights.
            return merge(partial, (weighted_sum(mass, v, dtype) / jnp.swapaxes(total, -3, -2), lse))

        nothing = (
            jnp.zeros((*batch, height, num_heads, value.shape[-1]), dtype),
            jnp.full((*batch, num_heads, height), -jnp.inf, dtype),
        )
        chunk_out, chunk_lse = _chunks(inputs[0].shape[len(batch)], settings.forward_key_chunk, key_chunk, nothing)
        return _put(out, chunk_out, n, -3), _put(lse, chunk_lse, n, -1)

    empty = (
        jnp.zeros((*batch, num_queries, num_heads, value.shape[-1]), settings.out_dtype),
        jnp.zeros((*batch, num_heads, num_queries), dtype),
    )
    return _chunks(num_queries, settings.query_chunk, query_chunk, empty)


class _Block(NamedTuple):
    """What belongs to one block of scores besides its queries and keys."""

    bias: Any
    mask: Any
    drops: Any


def _block(bias: Any, mask: Mask, drops: Drops | None, n: Any, height: int, m: Any, width: int) -> _Block:
    return _Block(
        None if bias is None else take(take(bias, n, height, -2), m, width, -1),
        mask.block(n, height, m, width),
        None if drops is None else drops.part(n, height, m, width),
    )


def _forward(settings: Settings, *arguments: Any) -> tuple[Any, Any]:
    outputs: Any = attend_in_blocks(settings, *arguments)
    return outputs, (*arguments, *outputs)


def _backward(settings: Settings, residuals: tuple, cotangents: tuple[jax.Array, jax.Array]) -> tuple:
    *arguments, out, lse = residuals
    d_out, d_lse = cotangents
    shift = d_lse - jnp.einsum("...nhd,...nhd->...hn", d_out, out, preferred_element_type=lse.dtype)
    d_query, *others = gradients_in_blocks(settings, *arguments, lse=lse, shift=shift, d_out=d_out)
    return d_query.astype(arguments[0].dtype), *others, None, None


def gradients_in_blocks(
    settings: Settings,
    query: Any,
    inputs: Any,
    scale: Any,
    bias: Any,
    mask: Any,
    drops: Any,
    *,
    lse: jax.Array,
    shift: jax.Array,
    d_out: jax.Array,
) -> tuple[Any, Any, Any, Any]:
    """Gradients with respect to query (float32), inputs, scale and bias.

    The weights are p = exp(s - lse), and the scores' gradient is ds = p (d_out v^T + shift), with lse and shift
    [*B, H, N]. For all keys at once shift is d_lse - d_out o; what these keys are only a part of, lse and shift
    include. A row without keys (lse -inf) has p = 0 throughout.
    """
    row_axis = query.ndim - 3
    some = jnp.isfinite(lse)
    lse, shift = jnp.where(some, lse, 0), jnp.where(some, shift, 0)

    def key_chunk(carry, m, width):
        d_query, d_inputs, d_scale, d_bias = carry
        chunk = _take_rows(inputs, row_axis, m, width)

        def query_chunk(carry, n, height):
            d_query, d_chunk, d_scale, d_bias = carry
            block = _block(bias, mask, drops, n, height, m, width)

            def contribution(q, chunk, scale, bias):
                k, v = settings.prepare(*chunk)
                scores = settings.scores(q, k, scale, bias, block.mask)
                weights = jnp.exp(scores - take(lse, n, height, -1)[..., None])
                dropped = settings.drop(weights, block.drops)
                return weighted_sum(dropped, v, lse.dtype), jnp.sum(weights, axis=-1)

            q, d_o = (take(x, n, height, -3) for x in (query, d_out))
            _, pull = jax.vjp(contribution, q, chunk, scale, block.bias)
            d_q, d_part, d_s, d_b = pull((d_o.astype(lse.dtype), take(shift, n, height, -1)))
            d_query = _put(d_query, take(d_query, n, height, -3) + d_q, n, -3)
            d_bias = None if d_bias is None else add_block(d_bias, d_b, n, m)
            return d_query, jax.tree.map(jnp.add, d_chunk, d_part), d_scale + d_s, d_bias

        zeros = tuple(jnp.zeros(x.shape, lse.dtype) for x in chunk)
        d_query, d_chunk, d_scale, d_bias = _chunks(
            query.shape[-3], settings.query_chunk, query_chunk, (d_query, zeros, d_scale, d_bias)
        )
        d_inputs = tuple(_put(x, d_x, m, row_axis) for x, d_x in zip(d_inputs, d_chunk, strict=True))
        return d_query, d_inputs, d_scale, d_bias

    carry = (
        jnp.zeros(query.shape, lse.dtype),
        jax.tree.map(jnp.zeros_like, inputs),
        jnp.zeros_like(scale),
        None if bias is None else jnp.zeros(bias.shape, lse.dtype),
    )
    num_keys = inputs[0].shape[row_axis]
    d_query, d_inputs, d_scale, d_bias = _chunks(num_keys, settings.backward_key_chunk, key_chunk, carry)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    return d_query, d_inputs, d_scale, d_bias


def add_block(x: jax.Array, update: jax.Array, n: Any, m: Any) -> jax.Array:
    """Adds to a block of an array whose last two axes may broadcast."""
    start = [0] * (x.ndim - 2) + [n if x.shape[-2] > 1 else 0, m if x.shape[-1] > 1 else 0]
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, start, update.shape) + update, start)


attend_in_blocks.defvjp(_forward, _backward)
