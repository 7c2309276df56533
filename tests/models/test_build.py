"""Models of configs: names at every depth, parts in mappings, keywords that parts inherit."""

import json

import jax
import pytest
from flax import linen as nn

from xattn.config import UsageError
from xattn.layers.positions import FourierPositions
from xattn.models import INHERITED, MODELS, PARTS, build
from xattn.models.perceiver_io import VARIANTS, PerceiverIO

POSITIONS = dict(name="fourier_positions", num_bands=2, max_resolution=(4, 4))
CONFIG = dict(
    name="perceiver_io",
    input_preprocessor=dict(
        name="multimodal_preprocessor",
        modalities=dict(
            picture=dict(name="image_preprocessor", positions=POSITIONS),
            kind=dict(name="one_hot_preprocessor"),
        ),
        mask_probs=dict(picture=0.0, kind=1.0),
    ),
    encoder=dict(name="perceiver_encoder"),
    decoder=dict(name="projection_decoder", output_features=3),
)


def test_a_mapping_of_parts_becomes_a_mapping_of_modules():
    model = build(CONFIG)
    assert isinstance(model, PerceiverIO)
    modalities = model.input_preprocessor.modalities
    assert set(modalities) == {"picture", "kind"} and all(isinstance(part, nn.Module) for part in modalities.values())
    assert modalities["picture"].positions == FourierPositions(2, (4, 4))
    assert dict(model.input_preprocessor.mask_probs) == dict(picture=0.0, kind=1.0)


def test_parts_inherit_what_the_config_around_them_sets():
    assert INHERITED == ("attention", "dtype", "variant")
    model = build(CONFIG | dict(variant="hf", attention="chunked"), dtype="bfloat16")
    picture = model.input_preprocessor.modalities["picture"]
    assert (picture.variant, picture.positions.variant, model.decoder.variant) == ("hf", "hf", "hf")
    assert (model.encoder.attention, model.attention) == ("chunked", "chunked")
    assert model.dtype == model.encoder.dtype == picture.dtype == model.decoder.dtype == "bfloat16"
    # A part's own keyword is stronger, for itself and for what it holds, and the config's than the caller's default.
    own = CONFIG["input_preprocessor"] | dict(variant="deepmind")
    model = build(CONFIG | dict(input_preprocessor=own, dtype="float32", variant="hf"), dtype="bfloat16")
    assert model.input_preprocessor.modalities["picture"].variant == "deepmind" and model.encoder.variant == "hf"
    assert model.encoder.dtype == "float32"


def test_names_and_keywords_are_checked_at_every_depth():
    with pytest.raises(UsageError, match="'perceiver_oi'.*perceiver_io"):
        build(CONFIG | dict(name="perceiver_oi"))
    modalities = dict(picture=dict(name="image_preprocessor", positions=POSITIONS | dict(bands=3)))
    prepare = dict(name="multimodal_preprocessor", modalities=modalities)
    where = "model.input_preprocessor.modalities.picture.positions"
    with pytest.raises(UsageError, match=f"{where} has no key 'bands'.*num_bands"):
        build(CONFIG | dict(input_preprocessor=prepare))
    with pytest.raises(UsageError, match="model 'one_hot_processor'.*one_hot_preprocessor"):
        build(CONFIG | dict(input_preprocessor=dict(name="one_hot_processor")))
    assert not set(MODELS) & set(PARTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_published_configs_are_json(name):
    config = VARIANTS[name]
    restored = json.loads(json.dumps(config), object_hook=_tuples)
    assert restored == config
    assert jax.tree.all(jax.tree.map(lambda a, b: type(a) is type(b), restored, config))
    assert isinstance(build(config), PerceiverIO)


def _tuples(values):
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
