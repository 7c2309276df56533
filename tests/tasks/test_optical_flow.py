"""The end-point error in closed form, on valid pixels, with a gradient that is finite everywhere."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.tasks.stand_in import Constant, constant
from tests.variables import normal
from xattn import tasks

TASK = tasks.build(dict(name="optical_flow"))


def batch():
    rng = np.random.default_rng(0)
    return {
        "frames": jnp.asarray(rng.integers(0, 256, (2, 2, 3, 4, 3)), jnp.uint8),
        "flow": 10 * normal(2, 3, 4, 2),
        "valid": jnp.asarray(rng.random((2, 3, 4)) < 0.6),
    }


def test_loss_is_the_mean_distance_over_valid_pixels_in_units_of_20():
    data, output = batch(), normal(2, 3, 4, 2, seed=1)
    loss, metrics, _ = TASK(Constant(), constant(output), data, train=False)
    gaps = 20 * np.asarray(output, np.float64) - data["flow"]
    distance = np.hypot(gaps[..., 0], gaps[..., 1])[np.asarray(data["valid"])].mean()
    np.testing.assert_allclose(metrics["epe"], distance, rtol=1e-5)
    np.testing.assert_allclose(loss, distance / 20, rtol=1e-5)


def test_gradient_is_finite_where_the_flow_is_exact_and_zero_where_it_is_not_valid():
    """The output starts at exactly zero, and so is the flow of many pixels."""
    data = batch()
    data["flow"] = data["flow"].at[:, 0].set(0)
    gradient = jax.grad(lambda output: TASK(Constant(), constant(output), data, train=False)[0])(
        jnp.zeros((2, 3, 4, 2))
    )
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    assert not np.asarray(gradient)[~np.asarray(data["valid"])].any()


def test_inputs_are_neighbourhoods_in_minus_one_to_one():
    frames = jnp.zeros((1, 2, 3, 3, 3), jnp.uint8).at[0, 1, 1, 2].set(jnp.array([255, 0, 51], jnp.uint8))
    (patches,) = TASK.inputs({"frames": frames})
    assert patches.shape == (1, 2, 3, 3, 27)
    # The pixel at row 1, column 2 is at row 1, column 2 of the neighbourhood of (1, 1): channels 15 to 17.
    np.testing.assert_allclose(patches[0, 1, 1, 1, 15:18], [1, -1, -0.6], rtol=1e-6)
    np.testing.assert_allclose(patches[0, 0, 1, 1], -1)
    np.testing.assert_allclose(patches[0, 0, 0, 0, :12], 0, err_msg="beyond the border there is zero, not black")
