"""What is handed to cuDNN and what is made of its results; that its numbers are right, only a GPU can show.

On a CPU jax's own implementation of the same function stands in for the kernel, and programs are lowered for CUDA. On a
GPU of the generation Ampere or later,

    JAX_PLATFORMS=cuda pytest tests/ops/attention/test_cudnn.py -k definition

holds the kernel itself to the definition.
"""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import PartitionSpec

from tests.ops.attention.test_attention import SEGMENTS, Case, by_definition, chosen
from xattn.ops.attention import Mask, api, cudnn, dot_product_attention
from xattn.parallel.mesh import make_mesh

REAL = jax.default_backend() == "gpu"


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The device that the choice sees."""
    if REAL:
        return
    monkeypatch.setattr(cudnn, "_widest_head", lambda: 128)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    api._log_once.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    if REAL:
        return
    attend = jax.nn.dot_product_attention

    def on_cpu(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return attend(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)


HALF = functools.partial(Case, width=8, v_width=8, dtype=jnp.float16)
CASES = {
    "nothing else": HALF(),
    "no leading axes, one key head": HALF(batch=(), kv_heads=1),
    "two leading axes, as many key heads": HALF(batch=(2, 3), heads=2),
    "causal": HALF(queries=8, mask=Mask.causal()),
    "causal and a bias": HALF(queries=8, mask=Mask.causal(), bias=(2, 4, 8, 8)),
    "causal between other lengths": HALF(mask=Mask.causal()),
    "bias of a head": HALF(bias=(4, 1, 8)),
    "mask of each head, with rows of no keys": HALF(mask=(2, 4, 6, 8)),
    "bias and mask": HALF(bias=(2, 1, 6, 8), mask=(1, 1, 8)),
    "structured mask": HALF(
        mask=Mask.causal(jnp.array([3, -2]))
        & Mask.window(3, None)
        & Mask.packed(*SEGMENTS)
        & Mask(q_mask=jnp.arange(6) != 3, kv_mask=jnp.arange(8) < jnp.array([[6], [5]])),
    ),
    "padded keys": HALF(mask=Mask(kv_mask=jnp.arange(8) < jnp.array([[6], [0]]))),
    "odd lengths": HALF(queries=5, keys=7),
    "odd queries": HALF(queries=1),
    "odd keys, two leading axes": HALF(batch=(2, 3), keys=7),
    "odd, causal": HALF(queries=7, keys=7, mask=Mask.causal()),
    "odd, causal between other lengths": HALF(queries=5, keys=7, mask=Mask.causal(2)),
    "odd, with a bias and a mask": HALF(queries=5, keys=7, bias=(2, 4, 5, 7), mask=(1, 1, 7)),
}


@pytest.mark.parametrize(
    ("name", "infinite"), [(name, False) for name in CASES] + [(n, True) for n, case in CASES.items() if case.bias]
)
def test_definition(name, infinite, stand_in):
    case = CASES[name]
    inputs = case.inputs()
    if infinite:
        inputs["bias"] = inputs["bias"].at[..., 2:4].set(-jnp.inf).at[0].set(-jnp.inf)
    same = inputs | {"d_lse": jnp.zeros_like(inputs["d_lse"])}
    if infinite:
        finite = inputs["bias"] > -jnp.inf
        mask = case.mask if isinstance(case.mask, Mask) else Mask(dense=inputs["mask"])
        same |= {"bias": jnp.where(finite, inputs["bias"], 0), "mask": mask & Mask(dense=finite)}
    wanted = by_definition(same, None)
    arrays = {name: inputs[name] for name in ("query", "key", "value", "bias") if inputs[name] is not None}

    def attend(arrays):
        return dot_product_attention(**arrays, mask=inputs["mask"], implementation="cudnn")

    out, pull = jax.vjp(attend, arrays)
    got = {"out": out, **pull(inputs["d_out"])[0]}
    assert out.dtype == jnp.float16
    for name, array in got.items():
        np.testing.assert_allclose(np.asarray(array, np.float64), wanted[name], rtol=2e-2, atol=1e-2, err_msg=name)
    empty = np.isneginf(wanted["lse"])
    for name in ("out", "query"):
        assert not np.swapaxes(got[name], -2, -3)[empty].any(), f"{name} of a row without keys is not zero"


def arrays(queries=64, keys=96, heads=4, kv_heads=2, width=32, v_width=32, dtype=jnp.bfloat16, v_dtype=None):
    shapes = ((queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, v_width))
    return [
        jax.ShapeDtypeStruct((2, *shape), d) for shape, d in zip(shapes, (dtype, dtype, v_dtype or dtype), strict=True)
    ]


def test_fused_is_this_kernel_wherever_it_can_serve(monkeypatch, stand_in):
    fused = functools.partial(chosen, monkeypatch, implementation="fused")
    assert fused(*arrays()) == ["cudnn"]
    assert fused(*arrays(queries=4096, keys=4096), mask=Mask.causal()) == ["cudnn"]
    assert fused(*arrays(), key_chunk_size=32) == ["chunked"]


def test_without_a_name_it_is_this_kernel_where_that_is_safe_and_pays(monkeypatch, stand_in):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    default = functools.partial(chosen, monkeypatch)
    large = functools.partial(arrays, queries=512, keys=512)  # 8 MiB of scores
    assert default(*large()) == ["xla"]  # eight devices, and how arrays are split nobody knows
    with jax.set_mesh(make_mesh(data=2, tensor=2, fsdp=1)):
        assert default(*large()) == ["cudnn"]
        assert default(*large(kv_heads=1)) == ["xla"]
    with jax.set_mesh(make_mesh(sequence=8)):
        assert default(*large()) == ["xla"]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for shapes, options, wanted in (
        ({}, {}, "cudnn"),
        ({}, {"mask": Mask.causal()}, "cudnn"),
        ({}, {"key_chunk_size": 32}, "chunked"),
        ({}, {"bias": jnp.zeros((), jnp.bfloat16)}, "xla"),
        ({}, {"mask": Mask(kv_mask=jnp.ones(512, bool))}, "xla"),
        ({"keys": 511}, {"mask": Mask.causal()}, "xla"),
        ({"dtype": jnp.float32}, {}, "xla"),
        ({"queries": 31, "keys": 16384}, {}, "xla"),
        ({"queries": 64, "keys": 511}, {}, "xla"),  # 2 bytes short of 1 MiB a head of 2 x 4
        ({"queries": 64, "keys": 512}, {}, "cudnn"),
        ({"queries": 4096, "keys": 4096}, {"mask": Mask.window(3, 3)}, "chunked"),
    ):
        assert default(*large(**shapes), **options) == [wanted], (shapes, options)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert default(*large()) == ["xla"]


def test_under_shard_map_each_device_calls_it(stand_in):
    inputs = HALF(batch=(4,), queries=5, keys=7, dtype=jnp.bfloat16).inputs()
    qkv = [inputs[name] for name in ("query", "key", "value")]
    attend = functools.partial(dot_product_attention, implementation="cudnn")
    rows = PartitionSpec("data")
    split = jax.shard_map(attend, mesh=make_mesh(data=4), in_specs=rows, out_specs=rows)
    np.testing.assert_allclose(np.float32(jax.jit(split)(*qkv)), np.float32(attend(*qkv)), rtol=2e-2, atol=1e-2)


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 1), reason="jax's rules for vmap were not whole")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gradients_under_vmap_are_lowered_for_cuda(axis, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def loss(query, key, value):
        return dot_product_attention(query, key, value, implementation="cudnn").astype(jnp.float32).sum()

    query, key, value = arrays(queries=65, keys=77)
    query = jax.ShapeDtypeStruct((*query.shape[:axis], 3, *query.shape[axis:]), query.dtype)
    mapped = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(axis, None, None))
    program = jax.jit(mapped).trace(query, key, value).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmha" in program and "Backward" in program


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", [None, Mask.causal(3), "keys", "heads"])
def test_each_device_of_a_mesh_has_its_rows_and_heads(kv_heads, mask, stand_in):
    shape = {"keys": (1, 1, 8), "heads": (4, 1, 8)}.get(mask, mask)
    case = HALF(batch=(4,), kv_heads=kv_heads, mask=shape, bias=(4, 6, 8), dtype=jnp.bfloat16)
    inputs = case.inputs()

    def attend(arrays, mask):
        return dot_product_attention(**arrays, mask=mask, implementation="cudnn")

    names = ("query", "key", "value", "bias")
    alone = jax.jit(attend)({name: inputs[name] for name in names}, inputs["mask"])
    with jax.set_mesh(make_mesh(data=2, tensor=4)):
        parts = jax.jit(attend)({name: inputs[name] for name in names}, inputs["mask"])
    whole_heads = kv_heads < 4  # the mesh does not divide them
    assert {shard.data.shape for shard in parts.addressable_shards} == {(2, 6, 4 if whole_heads else 1, 8)}
    np.testing.assert_allclose(np.float32(parts), np.float32(alone), rtol=2e-2, atol=2e-2)


def test_on_a_mesh_a_hidden_key_stays_hidden(stand_in):
    inputs = HALF(batch=(4,), queries=5, keys=7, dtype=jnp.bfloat16).inputs()
    qkv = [inputs[name] for name in ("query", "key", "value")]

    def both(*qkv):
        out, pull = jax.vjp(functools.partial(dot_product_attention, implementation="cudnn"), *qkv)
        return out, *pull(inputs["d_out"])

    alone = jax.jit(both)(*qkv)
    with jax.set_mesh(make_mesh(data=2, tensor=2)):
        parts = jax.jit(both)(*qkv)
    for part, whole in zip(parts, alone, strict=True):
        np.testing.assert_allclose(np.float32(part), np.float32(whole), rtol=2e-2, atol=2e-2)


MISFITS = {
    "all be bfloat16, or all float16, not float32": (dict(dtype=jnp.float32), {}),
    "all be bfloat16, or all float16, not bfloat16 and float16": (dict(v_dtype=jnp.float16), {}),
    "heads of 32 and 16 must be of one width": (dict(v_width=16), {}),
    "heads of 12 and 12 must be of one width, a multiple of 8": (dict(width=12, v_width=12), {}),
    "heads of 136 and 136 must be of one width, a multiple of 8 up to 128": (dict(width=136, v_width=136), {}),
    "a bias of float32 would be rounded to bfloat16": ({}, {"bias": jnp.zeros(())}),
    "a bias or a mask of 2048 x 4096 would take much memory": (dict(queries=2048, keys=4096), {"mask": Mask.causal()}),
    "its gradient may be NaN for 191 keys": (dict(keys=191), {"mask": Mask.causal()}),
    "the scale must be a number": ({}, {"scale": jnp.ones(4)}),
    "it has no soft cap": ({}, {"logits_soft_cap": 3.0}),
    "it does not drop the weights": ({}, {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}),
    "its log-sum-exp is not given out": ({}, {"return_lse": True}),
    "nothing to attend from or to": (dict(keys=0), {}),
}


@pytest.mark.parametrize("reason", MISFITS)
def test_what_it_cannot_serve_is_computed_otherwise_and_the_reason_logged_once(reason, monkeypatch):
    shapes, options = MISFITS[reason]
    with pytest.raises(ValueError, match=f"'cudnn' can't serve: .*{reason}"):
        jax.eval_shape(functools.partial(dot_product_attention, implementation="cudnn", **options), *arrays(**shapes))
    said = []
    monkeypatch.setattr(logging, "info", said.append)
    for _ in range(2):
        other = "chunked" if "memory" in reason else "xla"
        assert chosen(monkeypatch, *arrays(**shapes), implementation="fused", **options) == [other]
        assert chosen(monkeypatch, *arrays(**shapes), **options) == [other]
    assert len(said) == 1 and said[0].startswith("attention without cudnn: ") and reason in said[0]


def test_without_a_gpu_it_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="'cudnn' can't serve: it needs an NVIDIA GPU of .*; use 'fused' or leave it out"
    ):
        dot_product_attention(*(jnp.zeros((1, 4, 2, 8)),) * 3, implementation="cudnn")
    assert chosen(monkeypatch, *arrays(), implementation="fused") == ["xla"]


@pytest.mark.parametrize(
    ("capability", "widest"), [("7.5", None), ("8.0", 128), ("8.9", 128), ("9.0", 256), ("10.0", 128), ("12.0", 128)]
)
def test_the_widest_head_of_a_generation(monkeypatch, capability, widest):
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        jax.extend.backend, "get_backend", lambda: SimpleNamespace(platform_version="PJRT C API, cuda 12090")
    )
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert cudnn._widest_head() == widest


GRID = [
    dict(queries=queries, keys=keys, width=width, v_width=width, kv_heads=kv_heads, dtype=dtype)
    for queries, keys, width, kv_heads, dtype in itertools.product(
        (1, 64), (77, 62, 512), (8, 96, 128), (1, 4), (jnp.bfloat16, jnp.float16)
    )
]


@pytest.mark.parametrize("masked", ["no mask", "causal", "padding"])
def test_whatever_fits_is_lowered_for_cuda_with_its_gradient(masked, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    for shapes in GRID:
        kv_mask = jnp.arange(shapes["keys"]) < 60
        mask = {"no mask": None, "causal": Mask.causal(), "padding": Mask(kv_mask=kv_mask)}[masked]

        def loss(*inputs, mask=mask):
            return dot_product_attention(*inputs, mask=mask, implementation="cudnn").astype(jnp.float32).sum()

        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        program = step.trace(*arrays(**shapes)).lower(lowering_platforms=("cuda",)).as_text()
        assert "__cudnn$fmha" in program and "Backward" in program, shapes
        by_kernel = masked == "causal" and shapes["queries"] == shapes["keys"]
        assert ("CAUSAL" in program, "ScaleBias" in program) == (by_kernel, masked != "no mask" and not by_kernel)
