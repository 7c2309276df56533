"""Algebra of merge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.ops.attention import Mask, dot_product_attention, merge


@pytest.fixture(scope="module")
def inputs():
    """Query, key, value and a bias that shifts the scores of some keys by +-200."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 4, 8), (2, 9, 2, 8), (2, 9, 2, 6))
    )
    return query, key, value, jnp.asarray([0.0, 200.0, 0.0, 0.0, -200.0, -200.0, 0.0, 200.0, 0.0])


@functools.partial(jax.jit, static_argnums=(1, 2))
def over(inputs, start, stop, mask=None):
    query, key, value, bias = inputs
    keys = slice(start, stop)
    return dot_product_attention(query, key[:, keys], value[:, keys], bias=bias[keys], mask=mask, return_lse=True)


def close(a, b):
    np.testing.assert_allclose(a[0], b[0], atol=1e-6)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-6)


@pytest.fixture(scope="module")
def parts(inputs):
    # The first two queries have no key in the second part.
    seen = Mask(q_mask=jnp.arange(5) > 1)
    return over(inputs, 0, 2), over(inputs, 2, 6, seen), over(inputs, 6, 9)


def test_union(inputs):
    close(functools.reduce(merge, [over(inputs, 0, 2), over(inputs, 2, 6), over(inputs, 6, 9)]), over(inputs, 0, 9))


def test_associative_and_commutative(parts):
    a, b, c = parts
    close(merge(merge(a, b), c), merge(a, merge(b, c)))
    close(merge(a, b), merge(b, a))


def test_identity_is_exact(parts):
    for part in parts:
        nothing = jnp.zeros_like(part[0]), jnp.full_like(part[1], -jnp.inf)
        for merged in (merge(part, nothing), merge(nothing, part)):
            np.testing.assert_array_equal(merged[0], part[0])
            np.testing.assert_array_equal(merged[1], part[1])
    empty = merge(nothing, nothing)
    assert not empty[0].any()
    assert jnp.isneginf(empty[1]).all()


def test_gradient_equals_that_over_the_union_and_is_finite(inputs):
    query, key, value, bias = inputs
    mask = Mask(q_mask=jnp.arange(5) > 0)

    def loss(query, joined):
        moved = (query, *inputs[1:])
        out, lse = over(moved, 0, 9, mask) if not joined else merge(over(moved, 0, 4, mask), over(moved, 4, 9, mask))
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    gradient, wanted = jax.jit(lambda query: [jax.grad(loss)(query, joined) for joined in (True, False)])(query)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)
    assert not gradient[:, 0].any()


def test_keeps_float32():
    half = jnp.ones((3, 1, 2), jnp.bfloat16), jnp.zeros((1, 3))
    assert merge(half, half)[0].dtype == jnp.float32
