"""Attention of queries over keys and values that are all split along the sequence over the devices of a mesh axis.

Each of P devices holds N / P queries and M / P keys and values. Three exact ways to bring them together, and what a
device then sends, in numbers, with H heads of width D and one statistic a query and head, per batch entry:

    gather    All queries go to all devices, each attends to its own keys, and one reduce-scatter brings the weighted
              results home: (P - 1) N/P H (2 D + 3), in 3 collectives, 2 more for the gradients.
    ring      LV-XAttn (arXiv 2502.02406): the queries of a device travel round the ring of devices with their partial
              result, which `merge` completes: N/P H ((2 P - 1) D + P). No device ever holds all queries.
    kv_ring   Ring Attention (arXiv 2310.01889): keys and values travel: (P - 1) M/P G 2 D.

With few queries of many keys, as where a text reads a video, the first two send less: iff N H (D + 1) < M G D.
Within a device all of them go through `chunked`, forward and backward, so the scores never exist as a whole. Softmax
statistics and partial results are float32.

Deviations from the released code of LV-XAttn, which is not exact: its log-sum-exp starts at 0 (each row has an extra
key of score 0), it merges without a maximum (overflows above 88), an odd number of devices returns the wrong buffer,
causal masks compare indices within a block, heads have one width, and merging rounds to float16. In the backward pass
`rowsum(d_out * out)` travels instead of `out`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from xattn.ops.attention import chunked, dropout
from xattn.ops.attention.chunked import Drops
from xattn.ops.attention.masks import Mask, take
from xattn.ops.attention.merge import Partial, merge

AXIS = "sequence"
"""The mesh axis that queries and keys are split over."""
BATCH, HEADS = ("data", "fsdp"), ("tensor",)
"""Those that batch and heads are split over, where they divide them: as in the rules of `xattn.parallel.mesh`."""
_Axes = str | tuple[str, ...] | None


def attend(
    query: Float[Array, "*B N H D"],
    key: Float[Array, "*B M G D"],
    value: Float[Array, "*B M G Dv"],
    *,
    way: str,
    bias: Float[Array, "..."] | None,
    mask: Mask,
    scale: Any,
    logits_soft_cap: float | None,
    dropout_rate: float,
    dropout_rng: Any,
    query_chunk_size: int | None = None,
    key_chunk_size: int | None = None,
) -> tuple[Float[Array, "*B N H Dv"], Float[Array, "*B H N"]]:
    """`dot_product_attention` of whole arrays, computed where their parts lie on the axis `AXIS` of the current mesh.

    The first batch axis is split over `BATCH` and heads over `HEADS`, where these divide them. Masks, biases and
    dropout mean the whole sequence, as everywhere. Differentiable in reverse mode only.

    Args:
      way: "gather", "ring" or "kv_ring".
      query_chunk_size, key_chunk_size: of the blocks within a device.

    Raises:
      ValueError: no mesh with this axis is current, or it does not divide N and M.
    """
    devices = jax.sharding.get_abstract_mesh().shape.get(AXIS)
    if devices is None:
        raise ValueError(
            f"Implementation '{way}' needs a current mesh with the axis '{AXIS}': call it within "
            "jax.set_mesh(xattn.parallel.mesh.make_mesh(sequence=...))."
        )
    num_queries, num_keys = query.shape[-3], key.shape[-3]
    if num_queries % devices or num_keys % devices:
        raise ValueError(
            f"{num_queries} queries and {num_keys} keys do not both divide by the {devices} devices of mesh axis "
            f"'{AXIS}': pad them and mask the padding, or choose another size of the axis."
        )
    drops = None
    if dropout_rate:
        rows = dropout.row_keys(dropout_rng, (*query.shape[:-3], query.shape[-2], num_queries))
        drops = Drops(rows, jnp.arange(num_keys))
    scale = jnp.asarray(scale, jnp.promote_types(query.dtype, jnp.float32))
    pairs = _Pairs(scale, None if bias is None else jnp.atleast_2d(bias), mask, drops)
    plan = _Plan(way, logits_soft_cap, dropout_rate, query_chunk_size, key_chunk_size)
    return _over_mesh(plan, query, key, value, pairs)


gather, ring, kv_ring = (functools.partial(attend, way=way) for way in ("gather", "ring", "kv_ring"))


class _Plan(NamedTuple):
    """What a program is compiled for, besides shapes."""

    way: str
    logits_soft_cap: float | None
    dropout_rate: float
    query_chunk_size: int | None
    key_chunk_size: int | None

    def settings(self, query: Any, key: Any, value: Any) -> chunked.Settings:
        """Those of the blocks in which these queries attend to these keys."""
        sizes = chunked.block_size(query, key, value, self.query_chunk_size, self.key_chunk_size)
        wide = jnp.promote_types(value.dtype, jnp.float32)
        return chunked.Settings(*sizes, self.logits_soft_cap, self.dropout_rate, _as_they_are, wide)


def split_axes(batch: int | None, heads: int, kv_heads: int) -> tuple[_Axes, _Axes]:
    """The axes of the current mesh, if there are any, over which it splits a batch and these heads evenly."""
    mesh = jax.sharding.get_abstract_mesh().shape

    def over(axes: tuple[str, ...], *lengths: int) -> _Axes:
        axes = tuple(axis for axis in axes if axis in mesh)
        devices = math.prod(mesh[axis] for axis in axes)
        return axes if all(length % devices == 0 for length in lengths) else None

    return None if batch is None else over(BATCH, batch), over(HEADS, heads, kv_heads)


def _as_they_are(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    return key, value


class _Pairs(NamedTuple):
    """What belongs to pairs of a query and a key."""

    scale: Any
    bias: Any
    mask: Any
    drops: Any

    def part(self, row: Any, rows: int, column: Any, columns: int) -> "_Pairs":
        """That of queries row .. row + rows - 1 and keys column .. column + columns - 1 of the whole sequences.

        An array that was split over the devices has this device's part already, which `take` leaves as it is.
        """
        bias, mask, drops = self.bias, self.mask, self.drops

        def cut(x: Any) -> Any:
            return None if x is None else take(take(x, row, rows, -2), column, columns, -1)

        def side(x: Any, start: Any, size: int) -> Any:
            return None if x is None else take(x, start, size, -1)

        part = Mask(
            q_mask=side(mask.q_mask, row, rows),
            kv_mask=side(mask.kv_mask, column, columns),
            lower=None if mask.lower is None else mask.lower + row - column,
            upper=None if mask.upper is None else mask.upper + row - column,
            segments=tuple((side(q, row, rows), side(kv, column, columns)) for q, kv in mask.segments),
            dense=cut(mask.dense),
        )
        return _Pairs(self.scale, cut(bias), part, None if drops is None else drops.part(row, rows, column, columns))

    def specs(self, leading: tuple, heads: _Axes, queries: _Axes, keys: _Axes) -> "_Pairs":
        """How they are split where [*B, H, N, M] is [*leading, heads, queries, keys]."""
        mask, drops = self.mask, self.drops

        def split(x: Any, *axes: _Axes) -> Any:
            """An array that broadcasts to one with these axes; where its own has length 1, it stays whole."""
            if x is None:
                return None
            shape = jnp.shape(x)
            axes = axes[len(axes) - len(shape) :]
            return PartitionSpec(*(axis if size > 1 else None for axis, size in zip(axes, shape, strict=True)))

        scores, asking, asked = (*leading, heads, queries, keys), (*leading, queries), (*leading, keys)
        split_mask = Mask(
            q_mask=split(mask.q_mask, *asking),
            kv_mask=split(mask.kv_mask, *asked),
            lower=split(mask.lower, *leading),
            upper=split(mask.upper, *leading),
            segments=tuple((split(q, *asking), split(kv, *asked)) for q, kv in mask.segments),
            dense=split(mask.dense, *scores),
        )
        split_drops = None
        if drops is not None:
            first, second = (split(words, *scores[:-1]) for words in drops.rows)
            split_drops = Drops((first, second), split(drops.columns, keys))
        return _Pairs(split(self.scale, heads), split(self.bias, *scores), split_mask, split_drops)


@functools.partial(jax.jit, static_argnums=0)
def _over_mesh(plan: _Plan, query: Any, key: Any, value: Any, pairs: _Pairs) -> tuple[jax.Array, jax.Array]:
    # All axes of the mesh are manual: with others left to it, the compiler would gather batch and heads before each
    # all-gather and reduce-scatter.
    batch = query.shape[:-3]
    rows, heads = split_axes(batch[0] if batch else None, query.shape[-2], key.shape[-2])
    leading = (rows, *(None,) * (len(batch) - 1)) if batch else ()
    # The side that stays on its device has its part of what belongs to pairs; of the other side, all.
    queries, keys = (AXIS, None) if plan.way == "kv_ring" else (None, AXIS)
    whole = PartitionSpec(*leading, AXIS, heads, None)
    return jax.shard_map(
        functools.partial(_on_device, plan),
        in_specs=(whole, whole, whole, pairs.specs(leading, heads, queries, keys)),
        out_specs=(whole, PartitionSpec(*leading, heads, AXIS)),
        check_vma=False,
    )(query, key, value, pairs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_device(plan: _Plan, query: Any, key: Any, value: Any, pairs: _Pairs) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of this device's queries: [*B, N / P, H, Dv] and [*B, H, N / P]."""
    return _forward(plan, query, key, value, pairs)[0]


def _forward(plan: _Plan, query: Any, key: Any, value: Any, pairs: _Pairs) -> tuple[tuple, tuple]:
    forward = _gather_forward if plan.way == "gather" else _ring_forward
    out, lse, kept = forward(plan, query, key, value, pairs)
    return (out.astype(value.dtype), lse), (query, key, value, pairs, out, lse, kept)


def _backward(plan: _Plan, residuals: tuple, cotangents: tuple[jax.Array, jax.Array]) -> tuple:
    query, key, value, pairs, out, lse, kept = residuals
    d_out, d_lse = cotangents
    d_out = d_out.astype(lse.dtype)
    shift = d_lse - jnp.einsum("...nhd,...nhd->...hn", d_out, out)
    backward = _gather_backward if plan.way == "gather" else _ring_backward
    d_query, d_key, d_value, d_scale, d_bias = backward(plan, query, key, value, pairs, d_out, lse, shift, kept)
    d_bias = None if d_bias is None else d_bias.astype(pairs.bias.dtype)
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        _Pairs(d_scale, d_bias, None, None),
    )


_on_device.defvjp(_forward, _backward)


# gather


def _gather_forward(plan: _Plan, query: Any, key: Any, value: Any, pairs: _Pairs) -> tuple[Any, Any, Any]:
    own, num_keys, axis = query.shape[-3], key.shape[-3], query.ndim - 3
    query = lax.all_gather(query, AXIS, axis=axis, tiled=True)
    part = pairs.part(0, query.shape[-3], lax.axis_index(AXIS) * num_keys, num_keys)
    partial: Any = chunked.attend_in_blocks(plan.settings(query, key, value), query, (key, value), *part)
    out, lse = partial
    # `merge` of all devices at once.
    top = lax.pmax(lse, AXIS)
    top = jnp.where(jnp.isfinite(top), top, 0)
    mass = _by_query(jnp.exp(lse - top))
    total = lax.psum_scatter(jnp.concatenate([mass * out, mass], -1), AXIS, scatter_dimension=axis, tiled=True)
    out, mass = total[..., :-1], total[..., -1:]
    some = jnp.where(mass == 0, 1, mass)
    lse = jnp.where(mass == 0, -jnp.inf, jnp.log(some))[..., 0]
    return out / some, jnp.swapaxes(lse, -1, -2) + _own(top, own), (query, top)


def _gather_backward(
    plan: _Plan,
    query: Any,
    key: Any,
    value: Any,
    pairs: _Pairs,
    d_out: jax.Array,
    lse: jax.Array,
    shift: jax.Array,
    kept: Any,
) -> tuple:
    own, num_keys, axis = query.shape[-3], key.shape[-3], query.ndim - 3
    query, top = kept
    # All devices have the top of each row, but none has its sum: what is sent is divided by it before, so that
    # exp(s - top) takes the place of exp(s - lse).
    share = _by_query(jnp.where(jnp.isfinite(lse), jnp.exp(_own(top, own) - lse), 0))
    sent = jnp.concatenate([share * d_out, share * _by_query(shift)], -1)
    sent = lax.all_gather(sent, AXIS, axis=axis, tiled=True)
    part = pairs.part(0, query.shape[-3], lax.axis_index(AXIS) * num_keys, num_keys)
    d_query, d_kv, d_scale, d_bias = chunked.gradients_in_blocks(
        plan.settings(query, key, value),
        query,
        (key, value),
        *part,
        lse=top,
        shift=jnp.swapaxes(sent[..., -1], -1, -2),
        d_out=sent[..., :-1],
    )
    return lax.psum_scatter(d_query, AXIS, scatter_dimension=axis, tiled=True), *d_kv, d_scale, d_bias


def _by_query(x: jax.Array) -> jax.Array:
    """[*B, H, N] as [*B, N, H, 1]."""
    return jnp.swapaxes(x, -1, -2)[..., None]


def _own(x: jax.Array, size: int) -> jax.Array:
    """This device's queries of [*B, H, N]."""
    return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * size, size, x.ndim - 1)


# ring and kv_ring: the same step, with one side or the other on its way


def _rotate(step: Callable[..., tuple[Any, Any]], inputs: Any, home: Any, stay: Any) -> tuple[Any, Any]:
    """`home, stay = step(block, inputs, home, stay)` for the block of each device, while blocks go round the ring.

    A device passes `inputs` on to the next one, and the results `home` with them, which end where they began. `stay`
    are results of the device itself.
    """
    size, index = lax.axis_size(AXIS), lax.axis_index(AXIS)

    def hop(tree: Any) -> Any:
        ring = [(device, (device + 1) % size) for device in range(size)]
        return jax.tree.map(lambda x: lax.ppermute(x, AXIS, ring), tree) if size > 1 else tree

    def turn(hops: Any, carry: Any) -> Any:
        inputs, home, stay = carry
        following = hop(inputs)  # needs no result, so that it can go on during the step
        home, stay = step((index - hops) % size, inputs, home, stay)
        return following, hop(home), stay

    inputs, home, stay = lax.fori_loop(0, size - 1, turn, (inputs, home, stay))
    home, stay = step((index + 1) % size, inputs, home, stay)
    return hop(home), stay


def _ring_forward(plan: _Plan, query: Any, key: Any, value: Any, pairs: _Pairs) -> tuple[Any, Any, Any]:
    num_queries, num_keys, index = query.shape[-3], key.shape[-3], lax.axis_index(AXIS)
    settings = plan.settings(query, key, value)

    def add(partial: Partial, row: Any, query: Any, column: Any, kv: Any) -> Partial:
        part = pairs.part(row * num_queries, num_queries, column * num_keys, num_keys)
        return merge(partial, chunked.attend_in_blocks(settings, query, kv, *part))

    nothing = (
        jnp.zeros((*query.shape[:-1], value.shape[-1]), settings.out_dtype),
        jnp.full((*query.shape[:-3], query.shape[-2], num_queries), -jnp.inf, pairs.scale.dtype),
    )
    if plan.way == "ring":
        (out, lse), _ = _rotate(
            lambda block, query, partial, stay: (add(partial, block, query, index, (key, value)), stay),
            query,
            home=nothing,
            stay=None,
        )
    else:
        _, (out, lse) = _rotate(
            lambda block, kv, home, partial: (home, add(partial, index, query, block, kv)),
            (key, value),
            home=None,
            stay=nothing,
        )
    return out, lse, None


def _ring_backward(
    plan: _Plan,
    query: Any,
    key: Any,
    value: Any,
    pairs: _Pairs,
    d_out: jax.Array,
    lse: jax.Array,
    shift: jax.Array,
    kept: None,
) -> tuple:
    num_queries, num_keys, index = query.shape[-3], key.shape[-3], lax.axis_index(AXIS)
    settings = plan.settings(query, key, value)

    def add(totals: Any, row: Any, asked: Any, column: Any, kv: Any) -> Any:
        d_query, d_kv, d_scale, d_bias = totals
        row, column = row * num_queries, column * num_keys
        part = pairs.part(row, num_queries, column, num_keys)
        d_q, d_keys_values, d_s, d_b = chunked.gradients_in_blocks(settings, asked["query"], kv, *part, **asked["rest"])
        d_bias = None if d_bias is None else chunked.add_block(d_bias, d_b, row, column)
        return d_query + d_q, jax.tree.map(jnp.add, d_kv, d_keys_values), d_scale + d_s, d_bias

    def zeros(x: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, lse.dtype), x)

    kv, asked = (key, value), {"query": query, "rest": {"lse": lse, "shift": shift, "d_out": d_out}}
    d_pairs = zeros((pairs.scale, pairs.bias))
    if plan.way == "ring":

        def queries_travel(block: Any, asked: Any, d_query: Any, stay: Any) -> Any:
            d_query, *stay = add((d_query, *stay), block, asked, index, kv)
            return d_query, tuple(stay)

        d_query, (d_kv, *d_pairs) = _rotate(queries_travel, asked, zeros(query), (zeros(kv), *d_pairs))
    else:

        def keys_travel(block: Any, kv: Any, d_kv: Any, stay: Any) -> Any:
            d_query, d_kv, *d_pairs = add((stay[0], d_kv, *stay[1:]), index, asked, block, kv)
            return d_kv, (d_query, *d_pairs)

        d_kv, (d_query, *d_pairs) = _rotate(keys_travel, kv, zeros(kv), (zeros(query), *d_pairs))
    return d_query, *d_kv, *d_pairs
