"""Dropout of attention weights whose pattern does not depend on how the weights are computed."""

import math

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

RowKeys = tuple[UInt32[Array, "*B H N"], UInt32[Array, "*B H N"]]


def row_keys(rng: PRNGKeyArray, shape: tuple[int, ...]) -> RowKeys:
    """A Threefry key for each row of weights: the hash of (flat index over [*B, H], query index).

    Args:
      rng: a key of any implementation.
      shape: (*B, H, N).
    """
    seed = jax.random.bits(rng, (2,), jnp.uint32)
    heads = jnp.arange(math.prod(shape[:-1]), dtype=jnp.uint32).reshape(*shape[:-1], 1)
    queries = jnp.arange(shape[-1], dtype=jnp.uint32)
    return tuple(threefry2x32_p.bind(seed[0], seed[1], *jnp.broadcast_arrays(heads, queries)))


def keep(rows: RowKeys, columns: Array, rate: float) -> Bool[Array, "*B H N M"]:
    """Which weights stay: a pure function of the row's key and the key index.

    So a block of the pattern equals the same block of the whole pattern.

    Args:
      rows: from `row_keys`, or a slice of it.
      columns: int [M], the indices of the keys.
      rate: probability of a weight to drop.
    """
    columns = columns.astype(jnp.uint32)
    words = jnp.broadcast_arrays(rows[0][..., None], rows[1][..., None], columns, jnp.uint32(0))
    bits, _ = threefry2x32_p.bind(*words)
    return bits >= jnp.uint32(rate * 2**32)


def drop(weights: Float[Array, "*B H N M"], rows: RowKeys, columns: Array, rate: float) -> Float[Array, "*B H N M"]:
    """Inverted dropout: the weights that `keep` keeps are divided by 1 - rate, the others become 0."""
    return jnp.where(keep(rows, columns, rate), weights / (1 - rate), 0)


def drop_all(weights: Float[Array, "*B H N M"], rng: PRNGKeyArray, rate: float) -> Float[Array, "*B H N M"]:
    """`drop` for the whole matrix of weights."""
    return drop(weights, row_keys(rng, weights.shape[:-1]), jnp.arange(weights.shape[-1]), rate)
