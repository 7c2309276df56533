"""The gradient of GELU: what it is, and what is kept for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from tests.variables import normal
from xattn.ops.activations import gelu


@pytest.mark.parametrize("approximate, tolerance", [(False, 1e-6), (True, 2e-3)])
def test_values_and_gradients_are_those_of_the_definition(approximate, tolerance):
    x = 3 * normal(1000)
    slope = ndtr(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    value, (tangent,) = (
        gelu(x, approximate=approximate),
        jax.grad(lambda x: gelu(x, approximate=approximate).sum(), (0,))(x),
    )
    np.testing.assert_allclose(value, x * ndtr(x), atol=tolerance)
    np.testing.assert_allclose(tangent, slope, atol=4 * tolerance)


def test_nothing_but_the_input_is_kept_for_the_gradient():
    def kept(function):
        return sum(jnp.size(leaf) for leaf in jax.tree.leaves(jax.vjp(function, normal(1000))[1]))

    assert kept(lambda x: gelu(x, approximate=False)) == 1000
    assert kept(lambda x: jax.nn.gelu(x, approximate=False)) > 1000
