"""timm's CrossViT: outputs of timm on weights that a formula fills, and its state dicts there and back.

The numbers were printed by timm 1.0.31 with torch 2.13.0, for weights and images of `tests.interop.timm_weights`.
"""

import functools
import math
import re

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from tests.interop.timm_weights import CROSSVITS, crossvit_shapes, image, noise, wave
from xattn import interop
from xattn.config import UsageError
from xattn.interop import timm_crossvit
from xattn.models import build

# Parameters.
PUBLISHED = {
    "crossvit_tiny_240": 7_014_800,
    "crossvit_small_240": 26_856_272,
    "crossvit_base_240": 105_025_232,
    "crossvit_9_240": 8_553_296,
    "crossvit_15_240": 27_528_464,
    "crossvit_18_240": 43_271_408,
    "crossvit_9_dagger_240": 8_776_592,
    "crossvit_15_dagger_240": 28_209_008,
    "crossvit_18_dagger_240": 44_266_976,
    "crossvit_15_dagger_408": 28_500_080,
    "crossvit_18_dagger_408": 44_606_560,
}

# First logits, sum of their absolute values, the largest one, first entries of both normalised class tokens.
GOLDENS = {
    "crossvit_tiny_240": (
        (0.554318, -1.200399, 1.417067, -1.208466, 0.285754),
        1025.022,
        627,
        (0.582120, 0.490259, -1.047664),
        (0.966479, -0.658720, 0.886267),
    ),
    "crossvit_9_240": (
        (0.712423, -0.584084, 0.007795, 0.393029, -0.493911),
        1347.142,
        403,
        (0.547906, -0.611358, 1.028959),
        (1.003860, 1.870177, -0.217254),
    ),
    "crossvit_9_dagger_240": (
        (0.699780, -0.581758, 0.000927, 0.400483, -0.486431),
        1319.885,
        403,
        (0.547849, -0.605369, 1.032855),
        (0.992352, 1.864064, -0.226172),
    ),
    "crossvit_18_240": (
        (0.592920, 1.651256, 2.250146, 2.230831, 1.615817),
        1317.641,
        744,
        (0.105721, -0.572981, -1.131477),
        (0.536059, 0.160069, -0.383817),
    ),
    "crossvit_15_dagger_408": (
        (0.613176, 1.680557, 0.677105, -2.282323, -0.968098),
        1298.203,
        179,
        (0.289592, -1.178203, -0.609204),
        (1.276409, 0.412619, -0.674711),
    ),
}
SLOW = ("crossvit_18_240", "crossvit_15_dagger_408")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in GOLDENS])
def test_outputs_are_those_of_timm(name):
    first, total, best, *class_tokens = GOLDENS[name]
    model, variables = interop.from_torch("timm_crossvit", name, wave(crossvit_shapes(*CROSSVITS[name])))

    @jax.jit
    def run(variables, images):
        tokens = {}

        def keep(method, args, kwargs, context):
            out = method(*args, **kwargs)
            if context.module.name in ("norm_0", "norm_1"):
                tokens[context.module.name] = out[0, 0]
            return out

        with nn.intercept_methods(keep):
            return model.apply(variables, images), tokens

    (logits,), tokens = run(variables, image(int(name[-3:])))
    for i, expected in enumerate(class_tokens):
        np.testing.assert_allclose(tokens[f"norm_{i}"][:3], expected, atol=2e-5)
    np.testing.assert_allclose(logits[:5], first, atol=2e-5)
    assert np.abs(logits).sum() == pytest.approx(total, abs=5e-3)
    assert logits.argmax() == best


@pytest.mark.parametrize(
    "name", ["crossvit_9_dagger_240", pytest.param("crossvit_18_dagger_408", marks=pytest.mark.slow)]
)
def test_every_published_tensor_has_a_place(name):
    shapes = crossvit_shapes(*CROSSVITS[name])
    model = build(timm_crossvit.model_config(name))
    tensors = timm_crossvit.tensors(model, model.image_sizes[0], timm_crossvit._RULES)
    assert {key: tensor.shape for key, tensor in tensors.items()} == shapes


def test_numbers_of_tensors_and_of_parameters():
    """Of the shapes that the other tests hold ours to."""
    shapes = {name: crossvit_shapes(*sizes) for name, sizes in CROSSVITS.items()}
    assert {name: sum(map(math.prod, of.values())) for name, of in shapes.items()} == PUBLISHED
    counts = {name: len(shapes[name]) for name in ("crossvit_9_240", "crossvit_9_dagger_240")}
    assert counts == {"crossvit_9_240": 268, "crossvit_9_dagger_240": 276}


@functools.cache
def tiny(classes=1000, image_sizes=(240, 224)):
    widths, depth, ratio, dagger, _ = CROSSVITS["crossvit_tiny_240"]
    return noise(crossvit_shapes(widths, depth, ratio, dagger, image_sizes, classes))


@pytest.mark.parametrize("classes, image_sizes", [(1000, (240, 224)), (7, (96, 48)), (0, (36, 64))])
def test_state_dict_survives_bit_by_bit(classes, image_sizes):
    """With any number of classes and any size of the images, which the weights tell."""
    state = tiny(classes, image_sizes)
    model, variables = interop.from_torch("timm_crossvit", "crossvit_tiny_240", state)
    assert (model.num_classes, model.image_sizes) == (classes, image_sizes)
    back = interop.to_torch("timm_crossvit", "crossvit_tiny_240.in1k", variables)
    assert set(back) == set(state)
    for name, x in state.items():
        assert back[name].dtype == np.float32 and back[name].flags.c_contiguous
        np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_variables_are_those_of_the_model():
    state = tiny(7, (96, 48))
    model, variables = interop.from_torch("timm_crossvit", "crossvit_tiny_240", state)
    boxed = jax.eval_shape(model.init, jax.random.key(0), image(96))
    created = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), boxed)
    assert jax.tree.map(lambda x: x.shape, variables) == jax.tree.map(lambda x: x.shape, meta.unbox(created))
    back = interop.to_torch("timm_crossvit", "crossvit_tiny_240", created)
    assert {name: x.shape for name, x in back.items()} == {name: x.shape for name, x in state.items()}


def test_packed_rows_are_queries_keys_and_values_head_by_head():
    """Three heads of 64 in the second branch, whose projection has 3 * 192 rows."""
    state = tiny(7, (96, 48))
    _, variables = interop.from_torch("timm_crossvit", "crossvit_tiny_240", state)
    stage = variables["params"]["stage_2"]
    attention, weight = stage["branch_1"]["block_3"]["attn"], state["blocks.2.blocks.1.3.attn.qkv.weight"]
    for part, name in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(attention[name]["kernel"][:, 1, 5], weight[192 * part + 64 + 5])
    bias = state["blocks.2.blocks.1.3.attn.qkv.bias"]
    assert attention["key"]["bias"][2, 7] == bias[192 + 2 * 64 + 7]
    # The fusion of the first branch is as wide as the second.
    fusion = stage["fusion_0"]["attn"]
    for name in ("query", "key", "value"):
        weight = state[f"blocks.2.fusion.0.attn.w{name[0]}.weight"]
        np.testing.assert_array_equal(fusion[name]["kernel"][:, 2, 9], weight[2 * 64 + 9])
    weight = state["blocks.2.fusion.0.attn.proj.weight"]
    np.testing.assert_array_equal(fusion["out"]["kernel"][1, 3], weight[:, 64 + 3])


def test_files_of_ibm_name_the_same_models():
    """By the size of the second branch, and with a dot in four of their tensors."""
    state = tiny(7, (96, 48))
    official = {re.sub(r"^(pos_embed|cls_token)_", r"\1.", name): x for name, x in state.items()}
    assert "cls_token.1" in official
    theirs, ours = (
        interop.from_torch("timm_crossvit", name, weights)
        for name, weights in {"crossvit_tiny_224": official, "crossvit_tiny_240": state}.items()
    )
    assert theirs[0] == ours[0]
    jax.tree.map(np.testing.assert_array_equal, theirs[1], ours[1])
    name = "crossvit_15_dagger_384"
    assert timm_crossvit.model_config(name) == timm_crossvit.model_config("crossvit_15_dagger_408.in1k")
    assert build(timm_crossvit.model_config(name)).image_sizes == (408, 384)


def test_overrides_reach_the_model():
    overrides = dict(drop_path_rate=0.1, dtype="bfloat16", attention="chunked")
    model, variables = interop.from_torch("timm_crossvit", "crossvit_tiny_240", tiny(7, (96, 48)), **overrides)
    assert {name: getattr(model, name) for name in overrides} == overrides
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    with pytest.raises(UsageError, match="has no key 'drop_path'.*'drop_path_rate'"):
        interop.from_torch("timm_crossvit", "crossvit_tiny_240", tiny(7, (96, 48)), drop_path=0.1)
    with pytest.raises(UsageError, match="surplus blocks.0.projs.0.0.weight"):
        interop.from_torch("timm_crossvit", "crossvit_tiny_240", tiny(7, (96, 48)), fusion="none")


def test_every_tensor_that_does_not_fit_is_named():
    state = dict(tiny(7, (96, 48)))
    del state["blocks.1.fusion.0.attn.wk.bias"], state["head.0.weight"]
    state["blocks.0.blocks.0.1.norm1.weight"] = np.zeros(96, np.float32)
    state["head.1.weight"] = np.zeros((8, 192), np.float32)
    state["pos_embed_1"] = np.zeros((1, 11, 192), np.float32)
    with pytest.raises(UsageError) as error:
        interop.from_torch("timm_crossvit", "crossvit_tiny_240", state)
    for part in (
        "5 tensors",
        "missing blocks.1.fusion.0.attn.wk.bias",
        "missing head.0.weight",
        "surplus blocks.0.blocks.0.1.norm1.weight",
        "head.1.weight has shape [8, 192] instead of [7, 192]",
        "pos_embed_1 has shape [1, 11, 192] instead of [1, 197, 192]",  # 10 patches make no square: the published 196
    ):
        assert part in str(error.value), part


def test_weights_of_another_size_are_refused():
    with pytest.raises(UsageError, match=r"cls_token_0 has shape \[1, 1, 96\] instead of \[1, 1, 128\]"):
        interop.from_torch("timm_crossvit", "crossvit_9_240", tiny(7, (96, 48)))


@pytest.mark.parametrize("name", ["crossvit_9_dager_224", "9_240", "deit_tiny_patch16_224", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(UsageError, match=f"no CrossViT '{name}': .*crossvit_"):
        interop.from_torch("timm_crossvit", name, {})
