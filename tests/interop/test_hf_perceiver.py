"""Perceiver IO of transformers: outputs on seeded weights, state dicts there and back, what differs from DeepMind's."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import perceiver
from xattn import interop
from xattn.config import UsageError
from xattn.interop import hf_perceiver
from xattn.interop.perceiver import table
from xattn.models import build
from xattn.models.perceiver_io import VARIANTS

MASKED_LM, SEQUENCE, LEARNED, FOURIER, CONV, FLOW, MULTIMODAL = perceiver.ARCHITECTURES
# Fourier features of a 224th band are off by 1e-4 in the float32 of torch.
ATOL = dict.fromkeys(perceiver.ARCHITECTURES, 1e-6) | {FOURIER: 4e-6, MULTIMODAL: 2e-5}


@functools.cache
def golden(architecture):
    """The config, the seeded state dict and the outputs by variant and name (see make_perceiver_goldens.py)."""
    with np.load(Path(__file__).parent / "goldens" / f"{architecture}.npz") as file:
        held = dict(file)
    shapes = json.loads(str(held.pop("shapes")))
    return json.loads(str(held.pop("config"))), perceiver.fill(shapes), held


def given(architecture):
    arguments = perceiver.inputs(golden(architecture)[0])
    return arguments | (dict(query_mask=arguments["input_mask"]) if architecture == MASKED_LM else {})


@functools.cache
def forward(architecture, variant):
    """The jitted model with its variables."""
    config, state, _ = golden(architecture)
    model, variables = interop.from_torch("hf_perceiver", config, state, variant=variant)
    return functools.partial(jax.jit(model.apply), variables)


@pytest.mark.parametrize("variant", ["hf", "deepmind"])
@pytest.mark.parametrize("architecture", perceiver.ARCHITECTURES)
def test_outputs_are_those_of_the_reference(architecture, variant):
    expected = {
        name.removeprefix(f"{variant}_"): x for name, x in golden(architecture)[2].items() if name.startswith(variant)
    }
    got = forward(architecture, variant)(**given(architecture))
    got = got if isinstance(got, dict) else {"": got}
    assert set(got) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(got[name].reshape(x.shape), x, atol=ATOL[architecture], err_msg=name)


@pytest.mark.parametrize(
    "architecture, least",
    [(MASKED_LM, 1e-5), (LEARNED, 0.05), (FOURIER, 1e-6), (CONV, 0.01), (FLOW, 1e-6), (MULTIMODAL, 1e-4)],
)
def test_goldens_tell_the_variants_apart(architecture, least):
    """GELU shows everywhere; the residual of learned positions and the padding of the convolution show much more."""
    held = golden(architecture)[2]
    names = [name.removeprefix("hf_") for name in held if name.startswith("hf_")]
    assert max(np.abs(held[f"hf_{name}"] - held[f"deepmind_{name}"]).max() for name in names) > least


def test_only_the_released_decoder_of_learned_positions_has_no_residual():
    residuals = {
        (name, variant): hf_perceiver.model_config(golden(name)[0], variant=variant)["decoder"]["use_query_residual"]
        for name in (SEQUENCE, LEARNED, FOURIER, CONV)
        for variant in ("hf", "deepmind")
    }
    assert [key for key, residual in residuals.items() if not residual] == [(LEARNED, "deepmind")]


def test_masked_queries_are_ignored_by_transformers_alone():
    arguments = perceiver.inputs(golden(MASKED_LM)[0])
    mask = arguments["input_mask"]
    for variant in ("hf", "deepmind"):
        masked, free = (
            forward(MASKED_LM, variant)(**arguments | dict(query_mask=queries))
            for queries in (mask, np.ones_like(mask))
        )
        np.testing.assert_allclose(masked[mask], free[mask], atol=1e-6)
        difference = jnp.abs(masked - free)[~mask].max()
        assert difference == 0 if variant == "hf" else difference > 1e-3


def test_text_may_be_shorter_than_the_positions():
    """Shorter inputs give what padded ones do, at all positions."""
    arguments = given(MASKED_LM)
    tokens, mask = arguments["inputs"][1:, :7], arguments["input_mask"][1:, :7]
    short = forward(MASKED_LM, "hf")(inputs=tokens, input_mask=mask)
    np.testing.assert_allclose(short, golden(MASKED_LM)[2]["hf_"][1:], atol=1e-6)


@pytest.mark.parametrize("architecture", perceiver.ARCHITECTURES)
def test_state_dict_survives_bit_by_bit(architecture):
    """Also where config.json does not say which class it is for."""
    config, state, _ = golden(architecture)
    config = config | dict(architectures=None)
    state = dict(state)
    if architecture == CONV:
        counter = "perceiver.input_preprocessor.convnet.batchnorm.num_batches_tracked"
        expected = state | {counter: np.zeros((), np.int64)}
        state[counter] = np.array(77, np.int64)
    else:
        expected = state
    _, variables = interop.from_torch("hf_perceiver", config, state)
    assert set(variables) == ({"params", "batch_stats"} if architecture == CONV else {"params"})
    back = interop.to_torch("hf_perceiver", config, variables)
    assert set(back) == set(expected)
    for name, x in expected.items():
        assert back[name].dtype == x.dtype and back[name].shape == x.shape, name
        np.testing.assert_array_equal(back[name], x, err_msg=name)


# The sizes of the six published models, as in their config.json, and the number of tensors and of parameters they hold.
IMAGES = dict(d_latents=1024, num_latents=512, num_blocks=8, num_self_attends_per_block=6, num_labels=1000)
IMAGES |= dict(num_self_attention_heads=8, num_cross_attention_heads=1)
FLOWS = dict(d_latents=512, num_latents=2048, num_blocks=1, num_self_attends_per_block=24, train_size=[368, 496])
CLIPS = dict(d_latents=512, num_latents=784, num_blocks=1, num_self_attends_per_block=8, num_labels=700)
PUBLISHED = {
    MASKED_LM: ("language", dict(qk_channels=256, v_channels=1280), 457, 201_108_230),
    LEARNED: ("imagenet_learned", IMAGES | dict(image_size=224), 141, 62_255_848),
    FOURIER: ("imagenet_fourier", IMAGES, 136, 48_440_627),
    CONV: ("imagenet_conv", IMAGES, 142, 48_646_522),
    FLOW: ("optical_flow", FLOWS | dict(num_self_attention_heads=16, num_cross_attention_heads=1), 425, 41_057_134),
    MULTIMODAL: ("multimodal", CLIPS | dict(num_cross_attention_heads=1), 183, 19_858_855),
}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_published_sizes(architecture):
    """Every published tensor has a name, and together they are as large as published; nothing is allocated."""
    variant, sizes, tensors, parameters = PUBLISHED[architecture]
    config = sizes | dict(architectures=[architecture])
    ours = hf_perceiver.model_config(config, variant="deepmind")
    assert build(ours) == build(VARIANTS[variant])
    names = table(ours, hf_perceiver.rules(architecture), torch=True)
    assert len(names) + (architecture == CONV) == tensors  # and BatchNorm's counter
    assert sum(math.prod(names[name].shape) for name in names if "running_" not in name) == parameters


def test_overrides_reach_the_parts():
    config, state, _ = golden(FLOW)
    overrides = dict(
        dtype="bfloat16", attention="chunked", encoder=dict(remat=False), decoder=dict(decode_chunk_size=7)
    )
    model, _ = interop.from_torch("hf_perceiver", config, state, **overrides)
    assert model.encoder.dtype == model.decoder.dtype == model.input_preprocessor.dtype == "bfloat16"
    assert model.encoder.attention == model.decoder.attention == "chunked"
    assert (model.encoder.remat, model.decoder.decode_chunk_size) == (False, 7)
    assert (model.variant, model.encoder.variant, model.decoder.variant) == ("hf", "hf", "hf")
    with pytest.raises(UsageError, match="has no key 'varient'.*'variant'"):
        interop.from_torch("hf_perceiver", config, state, varient="deepmind")


def test_every_tensor_that_does_not_fit_is_named():
    config, state, _ = golden(FOURIER)
    state = dict(state)
    del state["perceiver.encoder.self_attends.1.mlp.dense2.bias"]
    state["perceiver.encoder.self_attends.2.mlp.dense2.bias"] = np.zeros(32, np.float32)
    state["perceiver.embeddings.latents"] = np.zeros((8, 33), np.float32)
    with pytest.raises(UsageError) as error:
        interop.from_torch("hf_perceiver", config, state)
    for part in (
        "3 tensors",
        "missing perceiver.encoder.self_attends.1.mlp.dense2.bias",
        "surplus perceiver.encoder.self_attends.2.mlp.dense2.bias",
        "perceiver.embeddings.latents has shape [8, 33] instead of [8, 32]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(architectures=["PerceiverModel"]), "no Perceiver class 'PerceiverModel'"),
        (dict(hidden_act="relu"), "hidden_act is 'relu': only 'gelu'"),
        (dict(num_self_attention_heads=5), "latent_features 32 is not divisible by num_self_heads 5"),
        (dict(v_channels=16), "v_features 16 .* must equal latent_features"),
    ],
)
def test_config_errors_name_the_key(changes, message):
    config, state, _ = golden(FOURIER)
    with pytest.raises(UsageError, match=message):
        interop.from_torch("hf_perceiver", config | changes, state)


def test_a_state_dict_of_something_else_is_refused():
    with pytest.raises(UsageError, match="config has no architectures: give one of PerceiverForMaskedLM"):
        interop.from_torch("hf_perceiver", {}, {"bert.embeddings": np.zeros(3)})
