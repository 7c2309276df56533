"""The layers against their equations, with attention from Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from tests.variables import normal, random_variables
from xattn.layers.transformer import DecoderLayer, EncoderLayer

HEADS, WIDTH = 2, 8


def norm(params, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return params["scale"] * x + params["bias"]


def attend(params, x, memory):
    return nn.MultiHeadDotProductAttention(HEADS).apply({"params": params}, x, memory)


def feed_forward(params, x):
    x = nn.relu(x @ params["linear1"]["kernel"] + params["linear1"]["bias"])
    return x @ params["linear2"]["kernel"] + params["linear2"]["bias"]


@pytest.fixture
def tokens():
    return normal(2, 3, 5, WIDTH, seed=2), normal(2, 3, 4, WIDTH, seed=3)


def test_encoder_layer_is_post_norm(tokens):
    x, _ = tokens
    layer = EncoderLayer(HEADS, mlp_dim=12)
    variables = random_variables(layer, x)

    @jax.jit
    def oracle(p, x):
        x = norm(p["norm1"], x + attend(p["self_attn"], x, x))
        return norm(p["norm2"], x + feed_forward(p["mlp"], x))

    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), oracle(variables["params"], x), atol=1e-5)


def test_decoder_layer_attends_to_itself_and_then_to_memory(tokens):
    x, memory = tokens
    layer = DecoderLayer(HEADS, mlp_dim=12)
    variables = random_variables(layer, x, memory)

    @jax.jit
    def oracle(p, x, memory):
        x = norm(p["norm1"], x + attend(p["self_attn"], x, x))
        x = norm(p["norm2"], x + attend(p["cross_attn"], x, memory))
        return norm(p["norm3"], x + feed_forward(p["mlp"], x))

    got = jax.jit(layer.apply)(variables, x, memory)
    np.testing.assert_allclose(got, oracle(variables["params"], x, memory), atol=1e-5)


def test_dropout_is_where_torch_has_it(tokens):
    x, memory = tokens
    layer = DecoderLayer(HEADS, mlp_dim=64, dropout_rate=0.5)
    variables = random_variables(layer, x, memory)
    rates = []

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, nn.Dropout):
            rates.append((out == 0).mean() - (args[0] == 0).mean())
        return out

    def forward(variables, key):
        with nn.intercept_methods(record):
            out = layer.apply(variables, x, memory, deterministic=False, rngs={"dropout": key})
        return out, [rates.pop(0) for _ in range(len(rates))]

    forward = jax.jit(forward)
    out, dropped = forward(variables, jax.random.key(0))
    assert len(dropped) == 4  # after both attentions, inside and after the feed-forward part
    np.testing.assert_allclose(jnp.stack([dropped[0], dropped[1], dropped[3]]), 0.5, atol=0.15)
    assert jnp.abs(forward(variables, jax.random.key(1))[0] - out).max() > 0.1
    np.testing.assert_array_equal(forward(variables, jax.random.key(0))[0], out)


def test_initial_values_are_those_of_torch(tokens):
    wide = jnp.zeros((1, 2, 64))
    p = meta.unbox(jax.jit(EncoderLayer(4, mlp_dim=256).init)(jax.random.key(0), wide))["params"]
    bounds = {
        ("self_attn", "query", "kernel"): np.sqrt(6 / (4 * 64)),
        ("self_attn", "value", "kernel"): np.sqrt(6 / (4 * 64)),
        ("self_attn", "query", "bias"): 0,
        ("self_attn", "out", "kernel"): 1 / 8,
        ("self_attn", "out", "bias"): 0,
        ("mlp", "linear1", "kernel"): 1 / 8,
        ("mlp", "linear1", "bias"): 1 / 8,
        ("mlp", "linear2", "kernel"): 1 / 16,
        ("mlp", "linear2", "bias"): 1 / 16,
    }
    for (part, name, leaf), bound in bounds.items():
        values = p[part][name][leaf]
        np.testing.assert_allclose(jnp.abs(values).max(), bound, rtol=0.1)
        np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.2)
