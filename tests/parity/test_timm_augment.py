"""timm's augmentation, erasing and mixing against ours, made to draw the same numbers; and what its recipe asks for."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.parity.torchvision_stub import timm
from tests.tasks.stand_in import Constant, constant
from tests.variables import normal
from xattn.data.mixing import mixup_or_cutmix
from xattn.data.random_erasing import random_erasing
from xattn.data.timm_augment import OPERATIONS, TimmRandAugment
from xattn.data.transforms import TimmTransform, draw_crop
from xattn.tasks.classification import Classification

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

RECIPE = "rand-m9-mstd0.5-inc1"
BICUBIC = Image.Resampling.BICUBIC
FILL = (124, 116, 104)


def recipe(monkeypatch, **options):
    """The steps of timm's `create_transform`; those of torchvision as (name, arguments)."""

    class Recorder:
        Compose = list

        def __getattr__(self, name):
            return lambda *args, **kwargs: (name, *args, *kwargs.values())

    factory = timm().data.transforms_factory
    monkeypatch.setattr(factory, "transforms", Recorder())
    return factory.create_transform(interpolation="bicubic", **options)


def test_training_is_the_recipe(monkeypatch):
    crop, flip, augment, _, _, erase = recipe(
        monkeypatch, input_size=224, is_training=True, auto_augment=RECIPE, re_prob=0.25, re_mode="pixel"
    )
    keywords = {name: entry.default for name, entry in inspect.signature(TimmTransform).parameters.items()}
    assert crop.scale == keywords["scale"] and crop.interpolation.value == "bicubic"
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3)) and flip == ("RandomHorizontalFlip", 0.5)
    assert augment.num_layers == keywords["num_layers"] == TimmRandAugment().num_layers
    assert augment.choice_weights is None and len(augment.ops) == len(OPERATIONS) == 15
    for operation in augment.ops:
        assert (operation.prob, operation.magnitude, operation.magnitude_std) == (0.5, 9, 0.5)
        assert operation.magnitude_max is None
        assert operation.kwargs == {"fillcolor": FILL, "resample": BICUBIC}
    assert (keywords["magnitude"], keywords["magnitude_std"]) == (9, 0.5)
    assert (erase.probability, erase.per_pixel, erase.min_area, erase.max_area) == (0.25, True, 0.02, 1 / 3)
    assert erase.log_aspect_ratio == pytest.approx((np.log(0.3), -np.log(0.3)))


@pytest.mark.parametrize("size, fraction, shorter", [(240, 0.875, 274), (224, 0.9, 248), (408, 1.0, 408)])
def test_evaluation_is_the_recipe(monkeypatch, size, fraction, shorter):
    resize, crop, *_ = recipe(monkeypatch, input_size=size, is_training=False, crop_pct=fraction)
    assert resize[:2] == ("Resize", shorter) and resize[2].value == "bicubic" and crop[0] == "CenterCrop"
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(shorter, shorter, 3), dtype=np.uint8))
    first = round((shorter - size) / 2)
    expected = np.asarray(image)[first : first + size, first : first + size]
    np.testing.assert_array_equal(TimmTransform(crop_fraction=fraction).evaluate(image, size), expected)


def test_sizes_of_crops_are_those_of_timm(monkeypatch):
    """The place is drawn in another order, the top before the left; where no draw fits, it is the middle of both."""
    transforms = timm().data.transforms
    monkeypatch.setattr(transforms.F, "get_image_size", lambda size: size, raising=False)
    for seed in range(150):
        width, height = ((300, 200), (500, 20), (20, 500))[seed % 3]
        rng = np.random.default_rng(seed)
        draws = types.SimpleNamespace(uniform=rng.uniform, randint=lambda low, high: 0)
        monkeypatch.setattr(transforms, "random", draws)
        get_params = transforms.RandomResizedCropAndInterpolation.get_params
        top, left, h, w = get_params((width, height), (0.08, 1.0), (3 / 4, 4 / 3))
        box = draw_crop(width, height, np.random.default_rng(seed))
        assert (box[2] - box[0], box[3] - box[1]) == (w, h)
        if (top, left) != (0, 0):
            assert box[:2] == (left, top)


@pytest.mark.parametrize("level", [0, 2.5, 7.3, 9, 9.99])
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_those_of_timm(monkeypatch, level, sign):
    auto_augment = timm().data.auto_augment
    monkeypatch.setattr(auto_augment.random, "random", lambda: 0.75 - 0.5 * (sign > 0))
    y, x = np.mgrid[:40, :60]
    pixels = np.stack([4 * x, 255 - 6 * y, 97 + x * y % 100], -1).astype(np.uint8)
    image = Image.fromarray(pixels)
    names = auto_augment.rand_augment_choices("", increasing=True)
    for name, (ours, operation) in zip(names, OPERATIONS.items(), strict=True):
        assert name.lower().removesuffix("increasing").removesuffix("rel") == ours.replace("_", "")
        hparams = {"img_mean": FILL, "interpolation": BICUBIC}
        theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)
        np.testing.assert_array_equal(operation(image, sign * level / 10), theirs(image), err_msg=name)


def bounds(changed):
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    return (rows[0], rows[-1], columns[0], columns[-1]) if len(rows) else None


def test_erased_boxes_are_those_of_timm(monkeypatch):
    import torch

    module = timm().data.random_erasing
    erase = module.RandomErasing(0.5, mode="pixel", device="cpu")
    images = np.full((40, 24, 36, 3), 7, np.uint8)
    ours = random_erasing({"image": images}, np.arange(40), probability=0.5)["image"]
    for seed, image in enumerate(ours):
        rng = np.random.default_rng([seed, 1])

        def randint(low, high, rng=rng):
            return int(rng.integers(high + 1))

        draws = types.SimpleNamespace(random=rng.random, uniform=rng.uniform, randint=randint)
        monkeypatch.setattr(module, "random", draws)
        theirs = erase(torch.full((3, 24, 36), 7.0)).numpy()
        assert bounds((theirs != 7).any(0)) == bounds((image != 7).any(-1))


@pytest.mark.parametrize("options", [{}, {"cutmix_alpha": 0.0}, {"mixup_alpha": 0.0}, {"probability": 0.3}])
def test_mixed_batches_and_their_loss_are_those_of_timm(monkeypatch, options):
    import torch

    images = np.random.default_rng(0).integers(256, size=(6, 24, 20, 3), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5, 2], np.int32)
    keywords = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0} | {
        {"probability": "prob"}.get(key, key): value for key, value in options.items()
    }
    mixup = timm().data.FastCollateMixup(**keywords, mode="batch", label_smoothing=0.1, num_classes=7)
    logits = normal(6, 7)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for name, draw in (("rand", rng.random), ("beta", rng.beta)):
            monkeypatch.setattr(np.random, name, draw)
        monkeypatch.setattr(np.random, "randint", lambda low, high, size, rng=rng: rng.integers(low, high))
        batch = [(image.transpose(2, 0, 1), label) for image, label in zip(images, labels, strict=True)]
        theirs, target = mixup(batch)
        ours = mixup_or_cutmix({"image": images, "label": labels}, np.arange(seed, seed + 6), **options)
        np.testing.assert_array_equal(ours["image"], theirs.numpy().transpose(0, 2, 3, 1))
        loss, *_ = Classification(label_smoothing=0.1)(
            Constant(), constant(logits), jax.tree.map(jnp.asarray, ours), train=False
        )
        log_p = torch.log_softmax(torch.from_numpy(np.array(logits)), -1)
        np.testing.assert_allclose(loss, -(target * log_p).sum(-1).mean(), rtol=1e-5)
