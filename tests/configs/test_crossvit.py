"""The configs of CrossViT and ViT name the published models, with the published recipe, and the small ones run."""

import importlib.util

import jax
import pytest

from xattn import data, models
from xattn.config import configs_dir, load_config
from xattn.models import crossvit, vit
from xattn.train import train
from xattn.train.optim import make_optimizer


def variants(name):
    spec = importlib.util.spec_from_file_location("variants", configs_dir() / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VARIANTS


def test_every_model_with_published_weights_has_a_variant():
    assert set(variants("crossvit/imagenet")) == set(crossvit.VARIANTS) - {"18_dagger_504"}
    assert set(variants("vit/imagenet")) == set(vit.VARIANTS)


@pytest.mark.parametrize("name", ["crossvit/imagenet", "vit/imagenet"])
def test_the_data_are_as_large_as_the_model_wants_them(name):
    for variant in variants(name):
        config = load_config(f"{name}:{variant}")
        model = models.build(config.model.to_dict())
        wanted = model.image_sizes[0] if name == "crossvit/imagenet" else model.image_size
        shapes = data.batch_shapes(config.data.to_dict(), config.pipeline.to_dict() | dict(batch_size=2))
        assert shapes["image"] == jax.ShapeDtypeStruct((2, wanted, wanted, 3), "uint8")
        assert shapes["mix"].shape == (2,)


def test_the_learning_rate_is_the_published_one():
    config = load_config("crossvit/imagenet:15_240")
    _, schedule = make_optimizer(config.optimizer.to_dict(), config.num_steps)
    epoch = 1_281_167 // 4096
    assert schedule(30 * epoch) == pytest.approx(0.004) and schedule(15 * epoch) == pytest.approx(0.002)
    assert schedule(300 * epoch) == pytest.approx(1e-5)


def test_eighteen_layers_see_each_image_three_times_in_a_row():
    assert load_config("crossvit/imagenet:18_240").pipeline.repeats == 3
    assert load_config("crossvit/imagenet:15_240").pipeline.repeats == 1


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "pets", "folders", "smoke"])
def test_transfer_has_neither_erasing_nor_stochastic_depth(dataset):
    config = load_config(f"crossvit/transfer:{dataset}")
    assert list(config.pipeline.transforms) == ["mixup_or_cutmix"] and config.model.drop_path_rate == 0
    data.batch_shapes(config.data.to_dict(), config.pipeline.to_dict())  # every key exists


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crossvit/transfer", "vit/imagenet"])
def test_smoke_trains_validates_and_evaluates(name, tmp_path):
    (result,) = train(load_config(f"{name}:smoke"), tmp_path / "run").values()
    assert len(result["per_example"]) == 8
