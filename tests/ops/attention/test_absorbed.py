"""Projections absorbed into the queries and the output, against projecting and attending."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.ops.attention import Mask, chunked, dot_product_attention
from xattn.ops.attention import absorbed as absorbed_module
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
    "bias and scale": dict(
        bias=jnp.linspace(-1, 1, QUERIES * KEYS).reshape(QUERIES, KEYS), scale=jnp.linspace(0.2, 0.5, HEADS)
    ),
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
        jnp.einsum("...mc,cgd->...mgd", inputs, kernel) + (0 if bias is None else bias) for kernel, bias in (key, value)
    )
    return dot_product_attention(query, *heads, implementation="reference", **options)


def absorbed(query, inputs, key, value, norm, **options):
    norm = None if norm is None else Norm(*norm, epsilon=0.01)
    return absorbed_attention(query, inputs, key, value, norm=norm, **options)


@pytest.mark.parametrize("chunks", [False, True], ids=["dense", "chunked"])
@pytest.mark.parametrize("case", CASES)
def test_equals_projecting_forward_and_backward(monkeypatch, case, chunks):
    if chunks:
        monkeypatch.setattr(absorbed_module, "CHUNKED_FROM", 0)
        monkeypatch.setattr(chunked, "KEY_CHUNK", 3)
    options = dict(CASES[case])
    inputs = arrays(**{name: options.pop(name) for name in ("biases", "norm", "kv_heads") if name in options})
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, QUERIES, HEADS, V_WIDTH)), jnp.float32)

    inputs |= {name: options.pop(name) for name in ("bias", "scale") if name in options}

    def both(attend):
        out = attend(**inputs, **options)
        return out, jax.grad(lambda inputs: jnp.sum(weights * attend(**inputs, **options)))(inputs)

    (out, grads), (wanted, wanted_grads) = jax.jit(both, static_argnums=0)(absorbed), both(projected)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * scale), grads, wanted_grads)
    if case == "queries without keys":
        assert not out[:, 1].any()


@pytest.mark.parametrize("norm", [False, True])
def test_bfloat16_is_as_near_as_bfloat16_keys_are(norm):
    inputs = arrays(norm=norm)
    exact = projected(**inputs)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
    errors = [jnp.std(attend(**low).astype(jnp.float32) - exact) for attend in (absorbed, projected)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_number_of_leading_axes(batch):
    inputs = arrays(norm=True)
    for name in ("query", "inputs"):
        inputs[name] = jnp.broadcast_to(inputs[name][0], (*batch, *inputs[name].shape[1:]))
    np.testing.assert_allclose(absorbed(**inputs), projected(**inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        # batch, queries, keys, channels, heads, kv_heads, width, v_width
        ((1, 512, 50176, 261, 1, 1, 261, 261), True),  # Perceiver: pixels
        ((1, 512, 512, 1024, 8, 8, 128, 128), False),  # its latents
        ((8, 1, 197, 256, 4, 4, 64, 64), True),  # CrossViT: a class token and patches
        ((2, 4096, 77, 768, 8, 8, 40, 40), False),  # an image and a text
        ((8, 24, 200, 384, 6, 6, 64, 64), True),
        ((1, 1, 16, 768, 12, 12, 64, 64), False),  # fewer multiply-adds, but the kernels are larger than all else
        ((64, 1, 16, 384, 6, 6, 64, 64), True),
        ((8, 4, 256, 1024, 16, 2, 64, 64), False),  # 0.61 of the multiply-adds; queries twice as large as keys, values
    ],
)
def test_it_is_chosen_where_it_was_measured_to_be_faster(sizes, wanted):
    assert absorbing_pays(*sizes) == wanted


def test_errors_speak_of_what_the_caller_gave():
    inputs, attend = arrays(), getattr(absorbed_attention, "__wrapped__", absorbed_attention)
    with pytest.raises(ValueError, match=r"query \(2, 3, 4, 6\) and inputs \(1, 8, 5\) must have the same leading"):
        attend(**(inputs | {"inputs": inputs["inputs"][:1]}))
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        attend(**(inputs | {"key": Affine(jnp.zeros((CHANNELS, 3, WIDTH)))}))


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

    small, large = temp_bytes(2**16 + 1), temp_bytes(2**18 + 1)  # both with a last chunk of one row
    assert large < 1.2 * small
    assert large < (16e6 if gradient else 8e6)
