"""The vision transformer: its equation, what tells it positions, and the published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.variables import normal, random_variables
from xattn.config import UsageError
from xattn.layers.vit import DropPath
from xattn.models import build

CONFIG = dict(name="vit", num_classes=5, image_size=6, patch_size=2, features=8, depth=2, num_heads=2, mlp_ratio=2.0)
IMAGES = normal(2, 6, 6, 3)


@functools.cache
def variables_of():
    return random_variables(build(CONFIG), IMAGES)


def run(variables=None, images=IMAGES, **changes):
    apply = jax.jit(build(CONFIG | changes).apply)
    return np.asarray(apply(variables_of() if variables is None else variables, images))


def norm(params, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return params["scale"] * x + params["bias"]


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def test_logits_are_those_of_the_equation():
    @jax.jit
    def oracle(p, images):
        patches = images.reshape(2, 3, 2, 3, 2, 3).swapaxes(2, 3).reshape(2, 9, 12)
        kernel = p["patch_embed"]["proj"]["kernel"].reshape(12, 8)
        x = patches @ kernel + p["patch_embed"]["proj"]["bias"]
        x = jnp.concatenate([jnp.broadcast_to(p["cls_token"], (2, 1, 8)), x], axis=1) + p["pos_embed"]
        for j in range(2):
            block = p[f"block_{j}"]
            attention, normed = nn.MultiHeadDotProductAttention(2), norm(block["norm1"], x)
            x += attention.apply({"params": block["attn"]}, normed, normed)
            hidden = jax.nn.gelu(dense(block["mlp"]["fc1"], norm(block["norm2"], x)), approximate=False)
            x += dense(block["mlp"]["fc2"], hidden)
        x = norm(p["norm"], x)
        return x, dense(p["head"], x[:, 0])

    tokens, logits = oracle(variables_of()["params"], IMAGES)
    np.testing.assert_allclose(run(), logits, atol=2e-5)
    np.testing.assert_allclose(run(num_classes=0), tokens[:, 0], atol=2e-5)
    np.testing.assert_allclose(run(num_classes=0, pool="mean"), tokens[:, 1:].mean(1), atol=2e-5)


def test_positions_tell_patches_apart():
    """Without them, and only then, the order of the patches is nothing."""
    exchanged = IMAGES.at[:, 0:2, 2:4].set(IMAGES[:, 4:6, 0:2]).at[:, 4:6, 0:2].set(IMAGES[:, 0:2, 2:4])
    params = variables_of()["params"]
    blind = {"params": params | {"pos_embed": jnp.zeros_like(params["pos_embed"])}}
    np.testing.assert_allclose(run(blind, exchanged), run(blind), atol=1e-5)
    assert np.abs(run(images=exchanged) - run()).max() > 0.01


def test_rates_of_drop_path_grow_evenly_over_the_depth():
    model, rates = build(CONFIG | dict(depth=3, drop_path_rate=0.2)), []

    def keep(method, args, kwargs, context):
        if isinstance(context.module, DropPath) and context.method_name == "__call__":
            rates.append(context.module.rate)
        return method(*args, **kwargs)

    with nn.intercept_methods(keep):
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        jax.eval_shape(functools.partial(model.init, train=True), keys, IMAGES)
    np.testing.assert_allclose(rates, [0, 0, 0.1, 0.1, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    "name, count",
    [
        ("deit_tiny_patch16_224", 5_717_416),
        ("vit_tiny_patch16_224", 5_717_416),
        ("deit_small_patch16_224", 22_050_664),
        ("deit_base_patch16_224", 86_567_656),
    ],
)
def test_published_numbers_of_parameters(name, count):
    shapes = jax.eval_shape(build(dict(name=name)).init, jax.random.key(0), normal(1, 224, 224, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("depth", [9, 15, 18])
@pytest.mark.parametrize("dagger", ["", "_dagger"])
def test_baselines_of_crossvit_are_its_second_branch_alone(depth, dagger):
    """As wide and as deep as the three stages of that branch together, and with its stem."""
    baseline, model = build(dict(name=f"deit_{depth}{dagger}")), build(dict(name=f"crossvit_{depth}{dagger}_240"))
    for name in ("features", "num_heads", "patch_size", "image_size"):
        fields = getattr(model, name if name in ("features", "num_heads") else f"{name}s")
        assert getattr(baseline, name) == fields[1]
    assert baseline.depth == model.num_stages * model.depths[1]
    assert (baseline.mlp_ratio, baseline.stem) == (model.mlp_ratio, model.stem)


@pytest.mark.parametrize(
    "changes, images, message",
    [
        (dict(image_size=7), IMAGES, "patches of 2 .* image of 7"),
        (dict(), normal(1, 6, 8, 3), "6 x 8 .* image_size is 6"),
        (dict(pool="max"), IMAGES, "pool 'max'.*token.*mean"),
    ],
)
def test_what_does_not_fit_is_named(changes, images, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(build(CONFIG | changes).init, jax.random.key(0), images)
