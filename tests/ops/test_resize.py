"""Bicubic resizing against its formula, pixel by pixel, and against numbers that torch printed."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.timm_weights import image
from tests.variables import normal
from xattn.ops.resize import bicubic_resize

resize = jax.jit(bicubic_resize, static_argnums=1)


def kernel(t, a=-0.75):
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def taps(position, size, length):
    """Clamped pixels and their weights for one output position on an axis."""
    source = (position + 0.5) * size / length - 0.5
    pixels = range(math.floor(source) - 1, math.floor(source) + 3)
    return [(min(max(pixel, 0), size - 1), kernel(source - pixel)) for pixel in pixels]


@pytest.mark.parametrize("size", [(9, 4), (3, 11), (7, 13), (1, 2)])
def test_each_pixel_is_the_weighted_sum_of_its_formula(size):
    x = np.asarray(normal(7, 5, 2), np.float64)
    expected = np.zeros((*size, 2))
    for i in range(size[0]):
        for j in range(size[1]):
            for row, down in taps(i, 7, size[0]):
                for column, across in taps(j, 5, size[1]):
                    expected[i, j] += down * across * x[row, column]
    np.testing.assert_allclose(resize(normal(7, 5, 2), size), expected, atol=1e-5)


def test_numbers_of_torch():
    """240 to 224, as the second branch of CrossViT sees its images."""
    (resized,) = np.asarray(resize(image(240), (224, 224)))
    expected = [[0.003481, 0.092778, 0.178446], [0.059338, 0.148268, 0.233155]]
    np.testing.assert_allclose(resized[:2, :3, 0], expected, atol=2e-6)
    assert resized[-1, -1, 2] == pytest.approx(-0.999551, abs=2e-6)
    assert resized.sum(dtype=np.float64) == pytest.approx(53.3682, abs=0.02)


def test_constant_images_stay_constant_and_bright_edges_overshoot():
    """The weights sum to one also at the border; they are no averages, since some are negative."""
    for size in ((3, 17), (12, 2)):
        np.testing.assert_allclose(resize(jnp.full((2, 8, 6, 3), 2.5), size), 2.5, rtol=1e-6)
    edge = jnp.array([0.0, 0, 0, 1, 1, 1])[None, :, None]
    resized = resize(edge, (1, 11))
    assert resized.max() > 1.01 and resized.min() < -0.01


def test_the_same_size_is_exact_on_each_axis():
    x = normal(2, 6, 5, 3)
    np.testing.assert_array_equal(resize(x, (6, 5)), x)
    # An axis that keeps its size is not touched: its rows are resized one by one.
    rows = [resize(x[:, i : i + 1], (1, 8)) for i in range(6)]
    np.testing.assert_array_equal(resize(x, (6, 8)), np.concatenate(rows, axis=1))


def test_leading_axes_are_independent_and_both_axes_are_treated_alike():
    x = normal(2, 3, 6, 5, 2)
    resized = resize(x, (4, 9))
    assert resized.shape == (2, 3, 4, 9, 2)
    np.testing.assert_allclose(resized[1, 2], resize(x[1, 2], (4, 9)), atol=1e-6)
    turned = resize(x.swapaxes(2, 3), (9, 4)).swapaxes(2, 3)
    np.testing.assert_allclose(turned, resized, atol=1e-5)
