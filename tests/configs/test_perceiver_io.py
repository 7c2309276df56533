"""The configs of the published models hold these models, and the small ones run."""

import json

import pytest

from xattn import cli
from xattn.config import load_config
from xattn.models.perceiver_io import VARIANTS
from xattn.train import train

# Parameters, and GFLOP of a forward pass: 2 for each multiply-add of a matrix product or convolution.
PUBLISHED = {
    "language": (201_108_230, 120.9),
    "imagenet_learned": (62_255_848, 478.0),
    "imagenet_fourier": (48_440_627, 406.1),
    "imagenet_conv": (48_646_522, 369.4),
    "optical_flow": (41_057_134, 1886.7),
    "multimodal": (19_858_855, 7468.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_is_the_published_one(name):
    model = load_config(f"perceiver_io/{name}").model.to_dict()
    model["input_preprocessor"].pop("train_mask_probs", None)  # part of the recipe
    assert model == VARIANTS[name]


def test_the_image_models_are_trained_alike():
    fourier = load_config("perceiver_io/imagenet_fourier").to_dict()
    for name in ("learned", "conv"):
        other = load_config(f"perceiver_io/imagenet_{name}").to_dict()
        assert {key for key in fourier if other[key] != fourier[key]} == {"model"}


def test_plus_plus_is_the_larger_language_model():
    assert load_config("perceiver_io/language:plus_plus").model.to_dict() == VARIANTS["language_plus_plus"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_inspect_counts_what_was_published(name, capsys):
    assert cli.main(["inspect", f"--config=perceiver_io/{name}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    parameters, gflop = PUBLISHED[name]
    assert report["parameters"] == parameters
    assert report["flops_forward"] / 1e9 == pytest.approx(gflop, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_smoke_trains_validates_and_evaluates(name, tmp_path):
    config = load_config(f"perceiver_io/{name}:smoke")
    (result,) = train(config, tmp_path / "run").values()
    assert len(result["per_example"]) == next(iter(config.evals.values())).num_examples
    assert result[result["metric"]] == pytest.approx(sum(result["per_example"]) / len(result["per_example"]), abs=1e-5)
