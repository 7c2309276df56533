"""Perceiver IO against transformers, on random configs and weights; its preprocessing against transformers'."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.interop import perceiver
from xattn import interop
from xattn.data.byte_tokenizer import decode, encode
from xattn.data.transforms import eval_crop
from xattn.tasks.common import normalize

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TOLERANCE = {
    "PerceiverForMaskedLM": 1e-6,
    "PerceiverForSequenceClassification": 1e-6,
    "PerceiverForImageClassificationLearned": 1e-6,
    "PerceiverForImageClassificationFourier": 5e-6,
    "PerceiverForImageClassificationConvProcessing": 1e-6,
    "PerceiverForOpticalFlow": 1e-6,
    "PerceiverForMultimodalAutoencoding": 2e-5,
}


@pytest.mark.parametrize("variant", ["hf", "deepmind"])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("architecture", perceiver.ARCHITECTURES)
def test_outputs_are_those_of_transformers(architecture, seed, variant):
    """Variant "deepmind" against transformers with the tanh of GELU, its decoder and its padding corrected."""
    config = perceiver.config(architecture, seed)
    state = perceiver.fill(perceiver.shapes(config))
    given = perceiver.inputs(config, seed)
    if architecture == "PerceiverForMaskedLM":
        given["query_mask"] = given["input_mask"]
    expected = perceiver.reference(config, state, given, variant)
    model, variables = interop.from_torch("hf_perceiver", config, state, variant=variant)
    out = jax.jit(model.apply)(variables, **given)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(out), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        difference = float(jnp.abs(ours.reshape(theirs.shape) - theirs).max())
        print(f"{architecture}{name} seed {seed} {variant}: {difference:.1e} of {np.abs(theirs).max():.2f}")
        assert difference < TOLERANCE[architecture], name


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (224, 224), (97, 130), (640, 481)])
def test_images_are_prepared_as_by_transformers(size):
    from transformers.models.perceiver.image_processing_pil_perceiver import PerceiverImageProcessorPil

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    processor = PerceiverImageProcessorPil()
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    prepared = normalize(jnp.asarray(eval_crop(image, 224)), mean, std)
    np.testing.assert_allclose(prepared, np.moveaxis(expected, 0, -1), atol=1e-5)


@pytest.mark.parametrize("text", ["", "missing.", "Straße 漢字 \U0001f9ea", "a\x00b\n"])
def test_text_is_prepared_as_by_transformers(text):
    from transformers import PerceiverTokenizer

    tokenizer = PerceiverTokenizer()
    for length in (None, 64):
        padding = {} if length is None else dict(padding="max_length", max_length=length)
        expected = tokenizer(text, **padding)
        tokens = encode(text, length, special_tokens=True)
        np.testing.assert_array_equal(tokens, expected["input_ids"])
        np.testing.assert_array_equal(tokens != 0, np.array(expected["attention_mask"], bool))
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(encode(text), np.array(bare, np.int32))
    assert decode(encode(text, special_tokens=True).tolist()) == text
