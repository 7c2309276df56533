"""The layers against their equations, and where the two published programs differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.variables import normal, random_variables
from xattn.config import UsageError
from xattn.layers.perceiver import CrossAttend, Mlp, SelfAttend, dense

VARIANTS = ("deepmind", "hf")


def norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return p["scale"] * x + p["bias"]


def gelu(x, variant):
    if variant == "hf":
        return 0.5 * x * (1 + jax.scipy.special.erf(x / 2**0.5))
    return 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)))


def mlp(p, x, variant):
    x = gelu(x @ p["dense1"]["kernel"] + p["dense1"]["bias"], variant)
    return x @ p["dense2"]["kernel"] + p["dense2"]["bias"]


def attend(p, x, memory):
    q, k, v = (
        jnp.einsum("bnc,chd->bnhd", y, p[name]["kernel"]) + p[name]["bias"]
        for name, y in (("query", x), ("key", memory), ("value", memory))
    )
    weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5)
    return jnp.einsum("bhnm,bmhd,hdc->bnc", weights, v, p["out"]["kernel"]) + p["out"]["bias"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_self_attend(variant):
    x = 3 * normal(2, 5, 8)
    layer = SelfAttend(2, qk_features=4, v_features=8, widening_factor=3, variant=variant)
    variables = random_variables(layer, x)

    @jax.jit
    def oracle(p, x):
        n = norm(p["norm"], x)
        x = x + attend(p["attention"], n, n)
        return x + mlp(p["mlp"], norm(p["mlp_norm"], x), variant)

    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), oracle(variables["params"], x), atol=1e-5)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("shape", "width"), [("kv", 6), ("q", 8)])
def test_cross_attend(residual, shape, width):
    x, memory = normal(2, 5, 8), normal(2, 7, 6, seed=1)
    layer = CrossAttend(2, use_query_residual=residual, attention_shape=shape)
    variables = random_variables(layer, x, memory)
    params = variables["params"]
    assert params["attention"]["query"]["kernel"].shape == (8, 2, width // 2)
    assert params["attention"]["value"]["kernel"].shape == (6, 2, width // 2)

    @jax.jit
    def oracle(p, x, memory):
        a = attend(p["attention"], norm(p["q_norm"], x), norm(p["kv_norm"], memory))
        a = x + a if residual else a
        return a + mlp(p["mlp"], norm(p["mlp_norm"], a), "deepmind")

    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x, memory), oracle(params, x, memory), atol=1e-5)
    if shape == "kv":
        kv = layer.apply(variables, memory, method="project_kv")
        np.testing.assert_allclose(layer.apply(variables, x, kv=kv), oracle(params, x, memory), atol=1e-5)


def test_the_two_gelus_differ_by_half_a_thousandth():
    x = jnp.linspace(-4, 4, 801)[None, :, None]
    one = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    tanh, exact = (Mlp(variant=v).apply({"params": {"dense1": one, "dense2": one}}, x) for v in VARIANTS)
    difference = jnp.abs(tanh - exact)[0, :, 0]
    np.testing.assert_allclose(difference.max(), 4.7e-4, rtol=0.02)
    np.testing.assert_allclose(abs(x[0, difference.argmax(), 0]), 2.69, atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding(variant, dtype):
    x, memory = normal(3, 5, 8), normal(3, 7, 6, seed=1)
    keys = jnp.array([[True] * 7, [True] * 4 + [False] * 3, [False] * 7])
    queries = jnp.array([True, True, False, True, True])[None].repeat(3, 0)
    layer = CrossAttend(2, use_query_residual=False, variant=variant, dtype=dtype)
    variables = random_variables(CrossAttend(2), x, memory)
    params = variables["params"]
    out = jax.jit(layer.apply)(variables, x, memory, keys, q_mask=queries)
    assert jnp.isfinite(out).all()
    if dtype == "bfloat16":
        return
    kept = jnp.array([0, 1, 3, 4])
    np.testing.assert_allclose(out[:1, kept], layer.apply(variables, x[:1, kept], memory[:1]), atol=1e-5)
    np.testing.assert_allclose(out[1:2, kept], layer.apply(variables, x[1:2, kept], memory[1:2, :4]), atol=1e-5)

    def after(attended):  # the layer once the attention is known
        return attended + mlp(params["mlp"], norm(params["mlp_norm"], attended), variant)

    nothing = after(params["attention"]["out"]["bias"])
    value = jnp.einsum("mc,chd->mhd", norm(params["kv_norm"], memory[2]), params["attention"]["value"]["kernel"])
    mean = (value + params["attention"]["value"]["bias"]).mean(0)
    uniform = after(
        jnp.einsum("hd,hdc->c", mean, params["attention"]["out"]["kernel"]) + params["attention"]["out"]["bias"]
    )
    np.testing.assert_allclose(out[2, 0], nothing if variant == "deepmind" else uniform, atol=1e-5)
    unmasked = layer.apply(variables, x[:1], memory[:1])[0, 2]
    np.testing.assert_allclose(out[0, 2], nothing if variant == "deepmind" else unmasked, atol=1e-5)
    assert jnp.abs(nothing - uniform).max() > 0.01 and jnp.abs(nothing - unmasked).max() > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_is_where_the_published_program_has_it(variant):
    x = normal(2, 16, 64)
    layer = SelfAttend(4, dropout_rate=0.5, variant=variant)
    variables = random_variables(layer, x)
    rates = {}

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, nn.Dropout):
            rates["/".join(context.module.path[:-1])] = (out == 0).mean()
        return out

    def forward(key):
        with nn.intercept_methods(record):
            return layer.apply(variables, x, deterministic=False, rngs={"dropout": key}), dict(rates)

    out, rates = jax.jit(forward)(jax.random.key(0))
    wanted = 0.5 if variant == "deepmind" else 0.0
    assert set(rates) == {"", "mlp"}
    np.testing.assert_allclose(list(rates.values()), wanted, atol=0.05)
    still = layer.apply(variables, x)
    assert jnp.abs(out - still).max() > 0.1
    if variant == "hf":  # the MLP does not drop, so dropping weights is all that changes
        quiet = SelfAttend(4, dropout_rate=0.0, variant=variant).apply(variables, x, deterministic=False)
        np.testing.assert_array_equal(quiet, still)


def test_initial_values():
    x, memory = jnp.zeros((1, 2, 256)), jnp.zeros((1, 2, 128))
    layers = {variant: CrossAttend(2, widening_factor=2, variant=variant) for variant in VARIANTS}
    draw = jax.jit(
        lambda: {v: nn.unbox(layer.init(jax.random.key(0), x, memory))["params"] for v, layer in layers.items()}
    )
    fan_in = {"query": 256, "key": 128, "value": 128, "out": 128, "dense1": 256, "dense2": 512}
    for variant, params in draw().items():
        for name, leaf in (params["attention"] | params["mlp"]).items():
            std = fan_in[name] ** -0.5 if variant == "deepmind" else 0.02
            np.testing.assert_allclose(leaf["kernel"].std(), std, rtol=0.03)
            assert (jnp.abs(leaf["kernel"]).max() < 2.28 * std) == (variant == "deepmind")
            assert not leaf["bias"].any()
    head = nn.unbox(dense(400, variant="deepmind", name=None).init(jax.random.key(0), memory))["params"]["kernel"]
    np.testing.assert_allclose(head.std(), 0.8796 * 128**-0.5, rtol=0.03)


def test_what_does_not_fit_is_named():
    x, memory = normal(1, 5, 8), normal(1, 7, 6)
    with pytest.raises(UsageError, match="qk_features 6 is not divisible by num_heads 4"):
        CrossAttend(4).init(jax.random.key(0), x, memory)
    with pytest.raises(UsageError, match="attention_shape 'both' is none of kv, q"):
        CrossAttend(attention_shape="both").init(jax.random.key(0), x, memory)
    with pytest.raises(UsageError, match="variant 'huggingface' is none of deepmind, hf"):
        SelfAttend(2, variant="huggingface").init(jax.random.key(0), x)
