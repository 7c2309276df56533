"""DeepMind's Haiku weights: their names and layouts, there and back, and the outputs of the released code."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import deepmind
from xattn import interop
from xattn.config import UsageError
from xattn.ops.patches import flow_patches

# Small sizes of the encoder, of which the input's width comes from the preprocessor, and what else must be smaller.
ENCODER = dict(num_latents=5, latent_features=16, num_blocks=2, num_self_attends_per_block=3, num_self_heads=4)
QUERY = dict(queries=dict(positions=dict(features=16)), output_features=7)
SMALL = {
    "language": dict(
        input_preprocessor=dict(max_positions=9, features=24),
        encoder=ENCODER | dict(num_cross_heads=2, qk_features=8, v_features=16),
        decoder=dict(
            num_heads=4, qk_features=8, v_features=12, queries=dict(index_dims=(9,), positions=dict(features=24))
        ),
    ),
    "imagenet_learned": dict(
        input_preprocessor=dict(num_channels=6, positions=dict(index_dims=(4, 4), features=10, project_features=8)),
        encoder=ENCODER,
        decoder=QUERY,
    ),
    "imagenet_fourier": dict(encoder=ENCODER, decoder=QUERY),
    "imagenet_conv": dict(encoder=ENCODER, decoder=QUERY),
    "optical_flow": dict(encoder=ENCODER, decoder=dict(qk_features=16, v_features=16)),
    "multimodal": dict(
        encoder=ENCODER,
        decoder=dict(output_features=20, queries=dict(label=dict(positions=dict(features=400)))),
        output_postprocessor=dict(modalities=dict(label=dict(features=11))),
    ),
}
ENCODER_OF = {"multimodal": "encoder"}
DECODER_OF = {"language": "basic_decoder", "optical_flow": "flow_decoder/~/basic_decoder"}
DECODER_OF |= {"multimodal": "multimodal_decoder/~/basic_decoder"}


def haiku_shapes(name):
    """Names and shapes of Haiku's parameters and averages, written down from the released programs."""
    shapes = {}

    def linear(module, inputs, outputs):
        shapes.update({f"{module}/w": (inputs, outputs), f"{module}/b": (outputs,)})

    def layer(module, q, kv, qk, v, widths):
        for norm, width in zip(("layer_norm", "layer_norm_1", "layer_norm_2"), widths, strict=False):
            shapes.update({f"{module}/{norm}/scale": (width,), f"{module}/{norm}/offset": (width,)})
        linear(f"{module}/attention/linear", q, qk)
        linear(f"{module}/attention/linear_1", kv, qk)
        linear(f"{module}/attention/linear_2", kv, v)
        linear(f"{module}/attention/linear_3", v, q)
        linear(f"{module}/mlp/linear", q, q)
        linear(f"{module}/mlp/linear_1", q, q)

    def table(module, *shape):
        shapes[f"{module}/pos_embs"] = shape

    inputs = {"language": 24, "imagenet_learned": 14, "imagenet_fourier": 261, "imagenet_conv": 322}
    inputs |= {"optical_flow": 322, "multimodal": 405}
    rows, text = inputs[name], name == "language"
    encoder = ENCODER_OF.get(name, "perceiver_encoder")
    table(f"{encoder}/~/trainable_position_encoding", 5, 16)
    layer(f"{encoder}/~/cross_attention", 16, rows, *((8, 16) if text else (rows, rows)), (16, rows, 16))
    for i in ("", "_1", "_2"):
        layer(f"{encoder}/~/self_attention{i}", 16, 16, *((8, 16) if text else (16, 16)), (16, 16))

    decoder = DECODER_OF.get(name, "classification_decoder/~/basic_decoder")
    query = {"language": 24, "optical_flow": 322, "multimodal": 402}.get(name, 16)
    layer(f"{decoder}/cross_attention", query, 16, *((8, 12) if text else (16, 16)), (query, 16, query))
    if not text:
        linear(f"{decoder}/output", query, {"optical_flow": 2, "multimodal": 20}.get(name, 7))
    if text:
        shapes |= {"embed/embeddings": (262, 24), "embedding_decoder/bias": (262,)}
        table("trainable_position_encoding", 9, 24)
        table("basic_decoder/~/trainable_position_encoding", 9, 24)
    elif name.startswith("imagenet"):
        table("classification_decoder/~/basic_decoder/~/trainable_position_encoding", 1, 16)
    image = "image_preprocessor"
    if name == "imagenet_learned":
        shapes |= {f"{image}/~/conv2_d/w": (1, 1, 3, 6), f"{image}/~/conv2_d/b": (6,)}
        table(f"{image}/~_build_network_inputs/trainable_position_encoding", 16, 10)
        linear(f"{image}/~_build_network_inputs/position_encoding_projector/linear", 10, 8)
    if name == "imagenet_conv":
        stem = f"{image}/~/conv2_d_downsample/~"
        names = ("scale", "offset", "~/mean_ema/average", "~/var_ema/average")
        shapes |= {f"{stem}/conv/w": (7, 7, 3, 64)} | {f"{stem}/batchnorm/{part}": (1, 1, 1, 64) for part in names}
    if name == "optical_flow":
        linear(f"{image}/patches_linear", 54, 64)
    if name == "multimodal":
        for modality, width, query in (("audio", 401, 385), ("image", 243, 195), ("label", 11, 400)):
            table(f"multimodal_preprocessor/{modality}_padding", 1, 405 - width)
            table(f"multimodal_preprocessor/{modality}_mask_token", 1, 405)
            table(f"multimodal_decoder/~decoder_query/{modality}_padding", 1, 402 - query)
        table("classification_decoder/~/basic_decoder/~/trainable_position_encoding", 1, 400)
        for module, outputs in (("audio", 16), ("projection", 3), ("classification", 11)):
            linear(f"{module}_postprocessor/linear", 20, outputs)
    return shapes


def arrays(name):
    rng = np.random.default_rng(0)
    return {key: rng.uniform(0.1, 1, shape).astype(np.float32) for key, shape in haiku_shapes(name).items()}


@functools.cache
def converted(name):
    return interop.from_haiku("deepmind_perceiver", name, arrays(name), **SMALL[name])


@pytest.mark.parametrize("name", SMALL)
def test_arrays_survive_bit_by_bit(name):
    """Every array of the released program has its place, and nothing else is asked for."""
    model, variables = converted(name)
    assert model.variant == "deepmind" and model.encoder.variant == "deepmind"
    back = interop.to_haiku("deepmind_perceiver", name, variables, **SMALL[name])
    assert set(back) == set(arrays(name))
    for key, x in arrays(name).items():
        np.testing.assert_array_equal(back[key], x, err_msg=key)


def test_arrays_lie_where_their_names_say():
    """What shapes alone cannot tell: query from key, the first norm from the second, layer from layer."""
    given = arrays("language")
    params = converted("language")[1]["params"]
    layer = params["encoder"]["self_attend_1"]
    module = "perceiver_encoder/~/self_attention_1"
    for ours, theirs in (("query", "linear"), ("key", "linear_1"), ("value", "linear_2")):
        kernel, bias = layer["attention"][ours]["kernel"], layer["attention"][ours]["bias"]
        np.testing.assert_array_equal(kernel.reshape(16, -1), given[f"{module}/attention/{theirs}/w"])
        np.testing.assert_array_equal(bias.ravel(), given[f"{module}/attention/{theirs}/b"])
    np.testing.assert_array_equal(layer["attention"]["out"]["kernel"][1, 2], given[f"{module}/attention/linear_3/w"][6])
    np.testing.assert_array_equal(layer["norm"]["scale"], given[f"{module}/layer_norm/scale"])
    np.testing.assert_array_equal(layer["mlp_norm"]["bias"], given[f"{module}/layer_norm_1/offset"])
    np.testing.assert_array_equal(layer["mlp"]["dense2"]["kernel"], given[f"{module}/mlp/linear_1/w"])
    cross = params["decoder"]["cross_attend"]
    for ours, theirs in (("q_norm", "layer_norm"), ("kv_norm", "layer_norm_1"), ("mlp_norm", "layer_norm_2")):
        np.testing.assert_array_equal(cross[ours]["bias"], given[f"basic_decoder/cross_attention/{theirs}/offset"])

    variables = converted("imagenet_conv")[1]
    given, norm = arrays("imagenet_conv"), "image_preprocessor/~/conv2_d_downsample/~/batchnorm"
    statistics = variables["batch_stats"]["input_preprocessor"]["bn"]
    np.testing.assert_array_equal(statistics["mean"], given[f"{norm}/~/mean_ema/average"].ravel())
    np.testing.assert_array_equal(statistics["var"], given[f"{norm}/~/var_ema/average"].ravel())
    np.testing.assert_array_equal(
        variables["params"]["input_preprocessor"]["bn"]["bias"], given[f"{norm}/offset"].ravel()
    )


def test_what_training_keeps_of_averages_is_not_needed():
    given = arrays("imagenet_conv")
    for key in list(given):
        if key.endswith("_ema/average"):
            given |= {key.replace("average", "hidden"): given[key], key.replace("average", "counter"): np.int32(7)}
    _, variables = interop.from_haiku("deepmind_perceiver", "imagenet_conv", given, **SMALL["imagenet_conv"])
    expected = converted("imagenet_conv")[1]
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_errors_name_what_does_not_fit():
    with pytest.raises(UsageError, match="no published Perceiver 'imagenet_fourrier'.*imagenet_fourier"):
        interop.from_haiku("deepmind_perceiver", "imagenet_fourrier", {})
    given = arrays("imagenet_fourier")
    del given["perceiver_encoder/~/self_attention_2/mlp/linear/b"]
    given["perceiver_encoder/~/self_attention_3/mlp/linear/b"] = np.zeros(16)
    with pytest.raises(
        UsageError, match=r"2 tensors: missing \S+self_attention_2/mlp.*surplus \S+self_attention_3/mlp"
    ):
        interop.from_haiku("deepmind_perceiver", "imagenet_fourier", given, **SMALL["imagenet_fourier"])


@functools.cache
def golden(name):
    """The shapes of Haiku's arrays and the outputs by kind and modality (see make_deepmind_goldens.py)."""
    with np.load(Path(__file__).parent / "goldens" / "deepmind_perceiver.npz") as file:
        held = {key.removeprefix(f"{name}/"): file[key] for key in file if key.startswith(f"{name}/")}
    shapes = {key: tuple(shape) for key, shape in json.loads(str(held.pop("shapes"))).items()}
    return shapes, held


@functools.cache
def outputs(name):
    """What our model gives for the goldens' weights and inputs, by modality."""
    arrays = deepmind.fill(golden(name)[0])
    model, variables = interop.from_haiku("deepmind_perceiver", name, arrays, **SMALL[name])
    given = deepmind.inputs(name)
    if name == "optical_flow":
        given["inputs"] = flow_patches(jnp.asarray(given["inputs"]))
    with jax.default_matmul_precision("highest"):
        out = jax.jit(model.apply)(variables, **given)
    return out if isinstance(out, dict) else {"": out}


@pytest.mark.parametrize("name", SMALL)
def test_names_are_those_of_the_released_code(name):
    assert haiku_shapes(name) == golden(name)[0]


# Largest errors, relative to the largest output of a modality. With Fourier features computed in float64 only rounding
# is left; as released, in float32, their own error grows with the highest band (15,360 half waves for audio). Another
# GELU would give 3e-4 or more.
EXACT = dict.fromkeys(SMALL, 5e-6)
RELEASED = EXACT | dict(imagenet_fourier=2e-4, imagenet_conv=2e-5, optical_flow=3e-4, multimodal=5e-3)
FOURIER = [name for name in SMALL if name not in ("language", "imagenet_learned")]


@pytest.mark.parametrize("name, kind", [(name, "released") for name in SMALL] + [(name, "exact") for name in FOURIER])
def test_outputs_are_those_of_the_released_code(name, kind):
    prefix = f"{kind}/"
    expected = {key.removeprefix(prefix): x for key, x in golden(name)[1].items() if key.startswith(prefix)}
    got = outputs(name)
    assert set(got) == set(expected)
    for part, x in expected.items():
        atol = np.abs(x).max() * (RELEASED if kind == "released" else EXACT)[name]
        np.testing.assert_allclose(got[part].reshape(x.shape), x, rtol=0, atol=atol, err_msg=part)
