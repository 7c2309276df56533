"""ResNet-12 against its equation, and its published size."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from tests.variables import normal, random_variables
from xattn.layers import convolution
from xattn.layers.convolution import conv
from xattn.models.resnet12 import ResNet12


def test_published_parameter_count_and_map_sizes():
    shapes = jax.eval_shape(
        lambda x: ResNet12().init_with_output(jax.random.key(0), x), jax.ShapeDtypeStruct((1, 84, 84, 3), jnp.float32)
    )
    stages, variables = shapes
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 12_424_320
    assert [stage.shape[1:] for stage in stages] == [(42, 42, 64), (21, 21, 160), (10, 10, 320), (5, 5, 640)]


def test_stages_follow_the_equation_with_running_statistics():
    model = ResNet12(widths=(3, 4, 5, 6), pool_last=False)
    images = normal(2, 13, 13, 3, seed=0)
    variables = random_variables(model, images)

    def conv_norm(variables, stage, name, x):
        p, s = (variables[collection][f"stage_{stage}"] for collection in ("params", "batch_stats"))
        kernel = p[f"conv_{name}"]["kernel"]
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        p, s = p[f"norm_{name}"], s[f"norm_{name}"]
        return (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    def leaky(x):
        return jnp.where(x > 0, x, 0.1 * x)

    @jax.jit
    def oracle(variables, x):
        stages = []
        for i in range(4):
            y = leaky(conv_norm(variables, i, 0, x))
            y = leaky(conv_norm(variables, i, 1, y))
            x = leaky(conv_norm(variables, i, 2, y) + conv_norm(variables, i, "shortcut", x))
            if i < 3:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            stages.append(x)
        return stages

    for stage, expected in zip(jax.jit(model.apply)(variables, images), oracle(variables, images), strict=True):
        np.testing.assert_allclose(stage, expected, rtol=1e-4, atol=1e-4)


def test_groups_of_images_change_nothing_and_in_training_there_are_none(monkeypatch):
    model, images = ResNet12(widths=(3, 4, 5, 6)), normal(2, 3, 16, 16, 3, seed=0)
    variables = random_variables(model, images)

    def run(train):
        return jax.jit(lambda v, x: model.apply(v, x, train=train, mutable=["batch_stats"] if train else []))

    whole = {train: run(train)(variables, images) for train in (False, True)}
    lengths = {train: len(run(train).lower(variables, images).as_text()) for train in (False, True)}
    monkeypatch.setattr(convolution, "CACHE", 4 * 6 * 16 * 16 * 3 // 2)  # two groups
    for train in (False, True):
        got = run(train)(variables, images)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, whole[train])
    assert len(run(False).lower(variables, images).as_text()) > 1.5 * lengths[False]
    assert len(run(True).lower(variables, images).as_text()) == lengths[True]


def test_convolutions_start_with_the_fan_out_of_kaiming():
    layer = jax.jit(Conv().init)(jax.random.key(0), jnp.zeros((1, 8, 8, 16)))
    kernel = meta.unbox(layer)["params"]["conv"]["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.05)


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return conv(64, 3, name="conv")(x)
