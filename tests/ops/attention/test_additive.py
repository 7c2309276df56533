"""Additive attention against the triple loop of its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.ops.attention import Mask, additive, additive_attention


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"query": (2, 5, 4, 8), "key": (2, 7, 2, 8), "value": (2, 7, 2, 6), "energy": (4, 8)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


MASK = jnp.asarray(np.random.default_rng(1).random((2, 1, 5, 7)) < 0.5).at[0, 0, 2].set(False)


def loop(query, key, value, energy, mask):
    query, key, value, energy = (np.asarray(x, np.float64) for x in (query, key, value, energy))
    out, lse = np.zeros((2, 5, 4, 6)), np.full((2, 4, 5), -np.inf)
    for b, h, n in np.ndindex(2, 4, 5):
        keys = np.flatnonzero(mask[b, 0, n])
        if len(keys):
            scores = np.array([energy[h] @ np.tanh(query[b, n, h] + key[b, m, h // 2]) for m in keys])
            lse[b, h, n] = np.log(np.exp(scores).sum())
            out[b, n, h] = np.exp(scores - lse[b, h, n]) @ value[b, keys, h // 2]
    return out, lse


# One query at a time, three, and all five.
@pytest.mark.parametrize("elements", [1, 3 * 2 * 7 * 4 * 8, 2**22])
def test_definition(arrays, elements, monkeypatch):
    monkeypatch.setattr(additive, "BLOCK_ELEMENTS", elements)
    out, lse = additive_attention(**arrays, mask=MASK, return_lse=True)
    wanted, wanted_lse = loop(**arrays, mask=np.asarray(MASK))
    np.testing.assert_allclose(out, wanted, atol=1e-6)
    np.testing.assert_allclose(lse, wanted_lse, atol=2e-6)
    assert not out[0, 2].any()


def test_gradient_by_finite_differences_and_zero_without_keys(arrays):
    rng = np.random.default_rng(2)
    cotangent = rng.normal(size=(2, 5, 4, 6))
    gradients = jax.jit(jax.grad(lambda arrays: (additive_attention(**arrays, mask=MASK) * cotangent).sum()))(arrays)
    assert not gradients["query"][0, 2].any()
    for name, gradient in gradients.items():
        step = rng.normal(size=gradient.shape)
        ends = [
            (loop(**arrays | {name: np.asarray(arrays[name], np.float64) + e * step}, mask=MASK)[0] * cotangent).sum()
            for e in (-1e-5, 1e-5)
        ]
        np.testing.assert_allclose((gradient * step).sum(), (ends[1] - ends[0]) / 2e-5, rtol=1e-3)


def test_zero_energy_averages_the_values(arrays):
    out = additive_attention(**arrays | {"energy": jnp.zeros((4, 8))}, mask=Mask(kv_mask=jnp.arange(7) < 4))
    mean = jnp.repeat(arrays["value"][:, :4].mean(1), 2, axis=1)
    np.testing.assert_allclose(out, jnp.broadcast_to(mean[:, None], out.shape), atol=1e-6)


def test_score_options_act_in_order(arrays):
    # Saturated tanh and a large energy: the capped score is +-1, then the bias decides.
    arrays = arrays | {"query": jnp.full((2, 5, 4, 8), 50.0), "energy": jnp.full((4, 8), 100.0)}
    bias = jnp.arange(7.0)
    options = {"scale": jnp.array([1.0, 2.0, 3.0, 4.0]), "logits_soft_cap": 1.0}
    _, lse = additive_attention(**arrays, bias=bias, return_lse=True, **options)
    np.testing.assert_allclose(lse, np.log(np.exp(1.0 + np.arange(7)).sum()), rtol=1e-6)


def test_dropout_divides_what_it_keeps(arrays):
    value = jnp.broadcast_to(jnp.eye(7)[:, None], (2, 7, 2, 7))
    whole = additive_attention(**arrays | {"value": value})
    dropped = additive_attention(**arrays | {"value": value}, dropout_rate=0.5, dropout_rng=jax.random.key(0))
    assert 0.3 < (dropped == 0).mean() < 0.7
    np.testing.assert_allclose(dropped, jnp.where(dropped == 0, 0, 2 * whole), rtol=1e-6)


def test_energy_of_another_shape(arrays):
    scores = getattr(additive.additive_scores, "__wrapped__", additive.additive_scores)
    options = {"bias": None, "mask": Mask(), "scale": 1.0, "logits_soft_cap": None}
    with pytest.raises(ValueError, match=r"energy \(2, 8\) must be \[H, D\] of the query, \(4, 8\)"):
        scores(arrays["query"], arrays["key"], jnp.zeros((2, 8)), **options)
