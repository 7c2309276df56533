"""Dropout of attention weights whose pattern does not depend on how the weights are computed.

Whether a weight drops is a hash of (key, flat index over [*B, H], query index, key index), so any block of
the pattern can be made on its own. The hash is MurmurHash3's 32-bit finaliser over the indices times the
golden ratio, with 64 random bits from the key; it costs a fraction of Threefry, which per weight would take
longer than attention itself.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

RowKeys = tuple[UInt32[Array, "*B H N"], UInt32[Array, "*B H N"]]


def _hash(x: jax.Array, index: jax.Array) -> jax.Array:
    """Mixes an index into 32-bit words."""
    x = x + index.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def row_keys(rng: PRNGKeyArray, shape: tuple[int, ...]) -> RowKeys:
    """Two random words for each row of weights, from its flat index over [*B, H] and its query index.

    Args:
      rng: a key of any implementation.
      shape: (*B, H, N).
    """
    heads = jnp.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1)
    first, second = (_hash(_hash(seed, heads), jnp.arange(shape[-1])) for seed in jax.random.bits(rng, (2,)))
    return first, second


def keep(rows: RowKeys, columns: Array, rate: float) -> Bool[Array, "*B H N M"]:
    """Which weights stay: a pure function of the row's words and the key index.

    Args:
      rows: from `row_keys`, or a slice of it.
      columns: int [M], the indices of the keys.
      rate: probability of a weight to drop.
    """
    first, second = (row[..., None] for row in rows)
    bits = _hash(_hash(first, columns) ^ second, columns)
    return bits >= jnp.uint32(rate * 2**32)


def drop(weights: Float[Array, "*B H N M"], rows: RowKeys, columns: Array, rate: float) -> Float[Array, "*B H N M"]:
    """Inverted dropout: the weights that `keep` keeps are divided by 1 - rate, the others become 0."""
    return jnp.where(keep(rows, columns, rate), weights / (1 - rate), 0)


def drop_all(weights: Float[Array, "*B H N M"], rng: PRNGKeyArray, rate: float) -> Float[Array, "*B H N M"]:
    """`drop` for the whole matrix of weights."""
    return drop(weights, row_keys(rng, weights.shape[:-1]), jnp.arange(weights.shape[-1]), rate)
