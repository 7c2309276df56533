"""The configs of the published models hold these models, and the small ones run."""

import json

import pytest

from xattn import cli
from xattn.config import load_config
from xattn.models.perceiver_io import VARIANTS
from xattn.train import train

PUBLISHED = ("language", "imagenet_learned", "imagenet_fourier", "imagenet_conv", "optical_flow", "multimodal")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_is_the_published_one(name):
    model = load_config(f"perceiver_io/{name}").model.to_dict()
    model["input_preprocessor"].pop("train_mask_probs", None)  # part of the recipe
    assert model == VARIANTS[name]


def test_plus_plus_is_the_larger_language_model():
    assert load_config("perceiver_io/language:plus_plus").model.to_dict() == VARIANTS["language_plus_plus"]


@pytest.mark.slow
def test_inspect_counts_what_was_published(capsys):
    """The counts of the others are those of `VARIANTS`, which have their own test."""
    assert cli.main(["inspect", "--config=perceiver_io/imagenet_fourier", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 48_440_627
    assert report["flops_forward"] / 1e9 == pytest.approx(406.1, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet_fourier", "language", "multimodal", "optical_flow"])
def test_smoke_trains_validates_and_evaluates(name, tmp_path):
    config = load_config(f"perceiver_io/{name}:smoke")
    (result,) = train(config, tmp_path / "run").values()
    assert len(result["per_example"]) == next(iter(config.evals.values())).num_examples
    assert result[result["metric"]] == pytest.approx(sum(result["per_example"]) / len(result["per_example"]), abs=1e-5)
