"""Structured masks against their definition, element by element."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.ops.attention import Mask

BATCH, HEADS, QUERIES, KEYS = 2, 3, 5, 7
RNG = np.random.default_rng(0)
Q_MASK, KV_MASK = RNG.random((BATCH, QUERIES)) < 0.7, RNG.random((BATCH, KEYS)) < 0.7
Q_SEGMENTS, KV_SEGMENTS = RNG.integers(0, 2, (BATCH, QUERIES)), RNG.integers(0, 2, (BATCH, KEYS))
DENSE = RNG.random((HEADS, 1, KEYS)) < 0.7
OFFSETS = np.array([2, -1])

MASKS = {
    "q_mask": (Mask(q_mask=jnp.asarray(Q_MASK)), lambda b, h, i, j: Q_MASK[b, i]),
    "kv_mask": (Mask(kv_mask=jnp.asarray(KV_MASK)), lambda b, h, i, j: KV_MASK[b, j]),
    "dense": (Mask(dense=jnp.asarray(DENSE)), lambda b, h, i, j: DENSE[h, 0, j]),
    "causal": (Mask.causal(), lambda b, h, i, j: j <= i),
    "causal offsets": (Mask.causal(jnp.asarray(OFFSETS)), lambda b, h, i, j: j <= i + OFFSETS[b]),
    "window": (Mask.window(1, 2), lambda b, h, i, j: i - 1 <= j <= i + 2),
    "left window": (Mask.window(0, None, offset=1), lambda b, h, i, j: i + 1 <= j),
    "packed": (
        Mask.packed(jnp.asarray(Q_SEGMENTS), jnp.asarray(KV_SEGMENTS)),
        lambda b, h, i, j: Q_SEGMENTS[b, i] == KV_SEGMENTS[b, j],
    ),
    "everything": (Mask(), lambda b, h, i, j: True),
}


def full(mask: Mask) -> np.ndarray:
    return np.broadcast_to(mask.as_array(QUERIES, KEYS), (BATCH, HEADS, QUERIES, KEYS))


@pytest.mark.parametrize("name", MASKS)
def test_as_array_is_the_condition(name):
    mask, allowed = MASKS[name]
    wanted = [allowed(*index) for index in itertools.product(*map(range, (BATCH, HEADS, QUERIES, KEYS)))]
    np.testing.assert_array_equal(full(mask).ravel(), wanted)


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations_with_replacement(MASKS, 2)))
def test_and_allows_what_both_allow(a, b):
    a, b = MASKS[a][0], MASKS[b][0]
    np.testing.assert_array_equal(full(a & b), full(a) & full(b))
    np.testing.assert_array_equal(full(b & a), full(a) & full(b))


def test_block_is_the_block_of_the_array():
    mask = Mask()
    for part, _ in MASKS.values():
        mask = mask & part
    block = jax.jit(mask.block, static_argnums=(1, 3))
    for row, column in itertools.product((0, 2, 3), (0, 1, 3)):
        got = np.broadcast_to(block(row, 2, column, 4), (BATCH, HEADS, 2, 4))
        np.testing.assert_array_equal(got, full(mask)[..., row : row + 2, column : column + 4])


def test_arrays_are_no_larger_than_their_parts_need():
    assert Mask(kv_mask=jnp.asarray(KV_MASK)).as_array(QUERIES, KEYS).shape == (BATCH, 1, 1, KEYS)
    assert Mask.causal().as_array(QUERIES, KEYS).shape == (1, QUERIES, KEYS)
    assert Mask().block(0, QUERIES, 0, KEYS) is None


def test_offset_may_be_traced():
    got = jax.jit(lambda cached: Mask.causal(cached).as_array(1, KEYS))(3)
    np.testing.assert_array_equal(got, [[[True] * 4 + [False] * 3]])
