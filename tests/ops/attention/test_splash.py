"""The splash kernel, run step by step on a CPU, against the definition; and where it is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from tests.ops.attention.test_attention import Case, by_definition, chosen
from xattn.ops.attention import Mask, api, dot_product_attention, splash
from xattn.parallel.mesh import make_mesh


@pytest.fixture(autouse=True)
def tpu(monkeypatch):
    """The device that the choice sees, and the kernel in the interpreter."""
    monkeypatch.setattr(splash, "INTERPRET", True)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    api._log_once.cache_clear()


LONG = functools.partial(Case, queries=128, keys=256, heads=2, kv_heads=1, width=128, v_width=128)
PAIR = (jnp.arange(128)[None] // jnp.array([[50], [200]]), jnp.arange(256)[None] // jnp.array([[100], [999]]))
CASES = {
    "nothing else": LONG(scale="heads"),
    "no leading axes, wider values": LONG(batch=(), kv_heads=2, v_width=256),
    "two leading axes and a soft cap": LONG(batch=(2, 2), cap=1.5),
    "causal with an offset, first rows without keys": LONG(mask=Mask.causal(-3)),
    "window": LONG(mask=Mask.window(20, 40, 64)),
    "padded keys, a row without any, in a window": LONG(
        mask=Mask.window(100, None) & Mask(kv_mask=jnp.arange(256) < jnp.array([[130], [0]]))
    ),
    "segments and padding": LONG(
        mask=Mask.packed(*PAIR) & Mask(q_mask=jnp.arange(128) != 7, kv_mask=jnp.arange(256) > 9)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_definition(name):
    case = CASES[name]
    inputs = case.inputs()
    wanted = by_definition(inputs | {"d_lse": jnp.zeros_like(inputs["d_lse"])}, case.cap)
    scale = {} if inputs["scale"] is None else {"scale": inputs["scale"]}

    def attend(arrays):
        return dot_product_attention(**arrays, mask=inputs["mask"], logits_soft_cap=case.cap, implementation="splash")

    out, pull = jax.vjp(attend, {name: inputs[name] for name in ("query", "key", "value")} | scale)
    for name, array in {"out": out, **pull(inputs["d_out"])[0]}.items():
        tolerance = 2e-5 * max(1, np.abs(wanted[name]).max())
        np.testing.assert_allclose(array, wanted[name], rtol=2e-4, atol=tolerance, err_msg=name)
    empty = np.isneginf(wanted["lse"])
    assert not np.swapaxes(out, -2, -3)[empty].any()


def test_each_device_of_a_mesh_has_its_rows_and_heads():
    inputs = LONG(batch=(4,), heads=4, kv_heads=2, mask=Mask(kv_mask=jnp.arange(256) < 200)).inputs()
    arrays = [inputs[name] for name in ("query", "key", "value")]

    def attend(*arrays):
        return dot_product_attention(*arrays, mask=inputs["mask"], implementation="splash")

    alone = jax.jit(attend)(*arrays)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        parts = jax.jit(attend)(*arrays)
    assert {shard.data.shape for shard in parts.addressable_shards} == {(1, 128, 2, 128)}
    np.testing.assert_allclose(parts, alone, rtol=1e-6, atol=1e-6)


def arrays(queries=512, keys=2**15, width=128, v_width=128, dtype=jnp.bfloat16):
    shapes = ((queries, 1, width), (keys, 1, width), (keys, 1, v_width))
    return [jax.ShapeDtypeStruct((1, *shape), dtype) for shape in shapes]


def test_fused_is_this_kernel_wherever_it_can_serve(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "info", said.append)
    fused = functools.partial(chosen, monkeypatch, implementation="fused")
    assert fused(*arrays()) == ["splash"]
    assert fused(*arrays(dtype=jnp.float32), mask=Mask.causal(5), logits_soft_cap=2.0) == ["splash"]
    assert fused(*arrays(), key_chunk_size=64) == ["chunked"]
    assert chosen(monkeypatch, *arrays(keys=256)) == ["xla"]
    assert said == ["attention without splash: it needs implementation='fused'."]


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        (dict(keys=2**15 + 64), {}, "512 queries, 32832 keys and heads of 128 and 128 must be multiples of 128"),
        (dict(width=64), {}, "heads of 64 and 128 must be multiples of 128"),
        (dict(dtype=jnp.float16), {}, "all be bfloat16, or all float32, not float16"),
        ({}, {"bias": jnp.zeros(())}, "it takes no bias"),
        ({}, {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}, "it does not drop weights"),
        ({}, {"mask": Mask.causal(jnp.int32(3))}, "it takes windows of constants"),
        ({}, {"mask": jnp.ones((512, 1), bool)}, "and no other mask"),
        ({}, {"mask": Mask.causal(-512)}, "the window allows nothing"),
        ({}, {"return_lse": True}, "its log-sum-exp is not given out"),
    ],
)
def test_what_it_cannot_serve_is_computed_in_chunks_and_the_reason_logged_once(monkeypatch, shapes, options, reason):
    with pytest.raises(ValueError, match=f"'splash' can't serve: .*{reason}"):
        jax.eval_shape(functools.partial(dot_product_attention, implementation="splash", **options), *arrays(**shapes))
    said = []
    monkeypatch.setattr(logging, "info", said.append)
    for _ in range(2):
        assert chosen(monkeypatch, *arrays(**shapes), implementation="fused", **options) == ["chunked"]
    assert len(said) == 1 and said[0].startswith("attention without splash: ") and reason in said[0]


def test_without_a_tpu_it_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="'splash' can't serve: it needs a TPU; use 'fused' or leave it out"):
        dot_product_attention(*(jnp.zeros((1, 128, 2, 128)),) * 3, implementation="splash")
