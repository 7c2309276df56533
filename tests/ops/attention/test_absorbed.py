"""Projections absorbed into the queries and the output, against projecting and attending."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.analysis.flops import count_flops
from xattn.ops.attention import Mask, api, chunked, dot_product_attention
from xattn.ops.attention.absorbed import Affine, Norm, absorbed_attention, absorbing_pays

QUERIES, KEYS, CHANNELS, HEADS, WIDTH, V_WIDTH = 3, 8, 5, 4, 6, 2
EMPTY_ROWS = jnp.asarray(np.arange(2 * QUERIES * KEYS).reshape(2, 1, QUERIES, KEYS) % 5 > 2).at[:, :, 1].set(False)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no biases": dict(biases=False),
    "norm": dict(norm=True),
    "shared heads": dict(kv_heads=2, norm=True),
    "queries without keys": dict(mask=EMPTY_ROWS, norm=True),
    "padding": dict(mask=Mask(kv_mask=jnp.arange(KEYS) < 5)),
    "soft cap": dict(logits_soft_cap=1.5),
    "bias and scale": dict(bias=jnp.linspace(-1, 1, QUERIES * KEYS).reshape(QUERIES, KEYS), scale=0.7),
    "dropout": dict(dropout_rate=0.5, dropout_rng=jax.random.key(3), norm=True),
}


def arrays(biases: bool = True, norm: bool = False, kv_heads: int = HEADS) -> dict[str, Any]:
    """Queries, inputs, projections and LayerNorm, from a fixed seed."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def affine(width):
        return Affine(normal(CHANNELS, kv_heads, width), normal(kv_heads, width) if biases else None)

    return {
        "query": normal(2, QUERIES, HEADS, WIDTH),
        "inputs": 3 + normal(2, KEYS, CHANNELS),
        "key": affine(WIDTH),
        "value": affine(V_WIDTH),
        "norm": (normal(CHANNELS), normal(CHANNELS)) if norm else None,
    }


def projected(query, inputs, key, value, norm, **options):
    """The definition."""
    if norm is not None:
        inputs = (inputs - inputs.mean(-1, keepdims=True)) / jnp.sqrt(inputs.var(-1, keepdims=True) + 0.01)
        inputs = inputs * norm[0] + norm[1]
    heads = (
        jnp.einsum("bmc,cgd->bmgd", inputs, kernel) + (0 if bias is None else bias) for kernel, bias in (key, value)
    )
    return dot_product_attention(query, *heads, implementation="reference", **options)


def absorbed(query, inputs, key, value, norm, **options):
    norm = None if norm is None else Norm(*norm, epsilon=0.01)
    return absorbed_attention(query, inputs, key, value, norm=norm, **options)


@pytest.mark.parametrize("chunks", [False, True], ids=["dense", "chunked"])
@pytest.mark.parametrize("case", CASES)
def test_equals_projecting_forward_and_backward(monkeypatch, case, chunks):
    if chunks:
        monkeypatch.setattr(api, "CHUNKED_ABOVE", 0)
        monkeypatch.setattr(chunked, "KEY_CHUNK", 3)
    options = dict(CASES[case])
    inputs = arrays(**{name: options.pop(name) for name in ("biases", "norm", "kv_heads") if name in options})
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, QUERIES, HEADS, V_WIDTH)), jnp.float32)

    def both(attend):
        out = attend(**inputs, **options)
        return out, jax.grad(lambda inputs: jnp.sum(weights * attend(**inputs, **options)))(inputs)

    (out, grads), (wanted, wanted_grads) = jax.jit(both, static_argnums=0)(absorbed), both(projected)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), grads, wanted_grads)
    if case == "queries without keys":
        assert not out[:, 1].any()


def test_bfloat16_is_as_near_as_bfloat16_keys_are():
    inputs = arrays(norm=True)
    exact = projected(**inputs)
    low = {name: jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs[name]) for name in ("query", "inputs")}
    out = absorbed(**(inputs | low))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.06 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize(("queries", "keys"), [(1, 2), (1, 300), (5, 40), (7, 300), (40, 40)])
def test_the_choice_is_the_one_with_fewer_flops(queries, keys, kv_heads):
    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    kernels = Affine(shape(CHANNELS, kv_heads, WIDTH)), Affine(shape(CHANNELS, kv_heads, V_WIDTH))
    args = shape(1, queries, HEADS, WIDTH), shape(1, keys, CHANNELS), *kernels
    flops = [count_flops(functools.partial(form, norm=None), *args).total() for form in (absorbed, projected)]
    wanted = flops[0] < flops[1]
    assert absorbing_pays(queries, keys, CHANNELS, HEADS, kv_heads, WIDTH, V_WIDTH) == wanted


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_memory_does_not_grow_with_the_inputs(gradient):
    """Temporaries of the ImageNet Perceiver's first cross-attention: 512 latents, 261 channels."""

    def temp_bytes(keys):
        def shape(*sizes):
            return jax.ShapeDtypeStruct(sizes, jnp.float32)

        affine = Affine(shape(261, 1, 261), shape(1, 261))
        args = shape(1, 512, 1, 261), shape(1, keys, 261), affine, affine, (shape(261), shape(261))
        function = jax.grad(lambda *args: absorbed(*args).sum(), (0, 1, 2, 3)) if gradient else absorbed
        return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes

    small, large = temp_bytes(2**16), temp_bytes(2**18 + 1)
    assert large < 1.2 * small
    assert large < (16e6 if gradient else 8e6)
