"""Conv-4 against its equation written with Linen's parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.variables import normal, random_variables
from xattn.models.conv4 import Conv4


@pytest.mark.parametrize("pool_last", [True, False])
def test_stages_follow_the_equation(pool_last):
    model = Conv4(widths=(4, 8, 8, 4), num_groups=2, pool_last=pool_last)
    images = normal(2, 3, 17, 16, 1, seed=0)
    variables = random_variables(model, images)

    @jax.jit
    def oracle(params, x):
        stages = []
        for i, width in enumerate((4, 8, 8, 4)):
            x = nn.Conv(width, (3, 3), use_bias=False).apply({"params": params[f"conv_{i}"]}, x)
            x = nn.relu(nn.GroupNorm(2, epsilon=1e-5).apply({"params": params[f"norm_{i}"]}, x))
            if pool_last or i < 3:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            stages.append(x)
        return stages

    stages = jax.jit(model.apply)(variables, images)
    for stage, expected in zip(stages, oracle(variables["params"], images.reshape(6, 17, 16, 1)), strict=True):
        np.testing.assert_allclose(stage.reshape(expected.shape), expected, atol=1e-5)
    assert stages[-1].shape == ((2, 3, 1, 1, 4) if pool_last else (2, 3, 2, 2, 4))


def test_default_has_no_batch_statistics_and_as_many_parameters_as_its_formula():
    variables = jax.eval_shape(Conv4().init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    assert set(variables) == {"params"}
    widths = (1, 32, 64, 64, 64)
    expected = sum(9 * a * b + 2 * b for a, b in zip(widths, widths[1:], strict=False))
    assert sum(x.size for x in jax.tree.leaves(variables)) == expected


def test_batch_norm_variant_keeps_running_statistics():
    model = Conv4(widths=(4, 4, 4, 4), norm="batch")
    images = normal(3, 16, 16, 1, seed=0)
    variables = random_variables(model, images)
    _, state = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, images)
    assert set(state["batch_stats"]) == {"norm_0", "norm_1", "norm_2", "norm_3"}
    for name, old in variables["batch_stats"].items():
        assert jnp.abs(state["batch_stats"][name]["mean"] - old["mean"]).min() > 0
