"""What is cut out of an image and what is done to it, against the same steps written out with Pillow."""

import numpy as np
import pytest
from PIL import Image

from xattn.config import UsageError
from xattn.data.randaugment import RandAugment
from xattn.data.timm_augment import TimmRandAugment
from xattn.data.transforms import draw_crop, eval_crop, image_transform

BICUBIC = Image.Resampling.BICUBIC


def noise(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "height, width, size, box",
    [(301, 401, 224, (69, 19, 332, 282)), (300, 517, 224, (127, 19, 389, 281)), (97, 55, 32, (14, 35, 41, 62))],
)
def test_eval_crop_takes_the_square_of_transformers(height, width, size, box):
    """The boxes, (left, top, right, bottom), are those of PerceiverImageProcessor for crop_size = size + 32."""
    image = noise(height, width)
    expected = np.asarray(image.crop(box).resize((size, size), BICUBIC))
    np.testing.assert_array_equal(eval_crop(image, size), expected)
    np.testing.assert_array_equal(image_transform(None).evaluate(image, size), expected)


@pytest.mark.parametrize(
    "height, width, size, fraction, whole, corner",
    [
        (301, 401, 240, 0.875, (365, 274), (62, 17)),
        (500, 333, 224, 0.875, (256, 384), (16, 80)),
        (97, 55, 32, 0.875, (36, 63), (2, 16)),
        (41, 50, 40, 1.0, (48, 40), (4, 0)),
    ],
)
def test_timm_scales_the_shorter_side_and_takes_the_centre(height, width, size, fraction, whole, corner):
    """Sizes, (width, height), and corners, (left, top), are what torchvision's Resize and CenterCrop come to."""
    image = noise(height, width)
    left, top = corner
    expected = np.asarray(image.resize(whole, BICUBIC).crop((left, top, left + size, top + size)))
    transform = image_transform({"name": "timm", "crop_fraction": fraction})
    np.testing.assert_array_equal(transform.evaluate(image, size), expected)


@pytest.mark.parametrize("size", [16, 61])
def test_mirrored_before_or_after_scaling_pixels_are_the_same(size):
    part, flip = noise(30, 50), Image.Transpose.FLIP_LEFT_RIGHT
    after = part.resize((size, size), BICUBIC).transpose(flip)
    np.testing.assert_array_equal(part.transpose(flip).resize((size, size), BICUBIC), after)


def test_perceiver_augments_before_scaling_and_timm_after():
    part = noise(30, 50)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        expected = RandAugment(4, 5)(part, rng).resize((16, 16), BICUBIC)
        ours = image_transform({"name": "perceiver_io"}).train(part, 16, np.random.default_rng(seed))
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
        rng = np.random.default_rng(seed)
        expected = TimmRandAugment(3, 8, 1.0)(part.resize((16, 16), BICUBIC), rng)
        timm = image_transform({"name": "timm", "num_layers": 3, "magnitude": 8, "magnitude_std": 1.0})
        np.testing.assert_array_equal(np.asarray(timm.train(part, 16, np.random.default_rng(seed))), expected)


def test_without_layers_images_are_scaled_only():
    part = noise(30, 50)
    for options in (None, {"name": "timm", "num_layers": 0}):
        transform = image_transform(options)
        trained = transform.train(part, 16, np.random.default_rng(0))
        np.testing.assert_array_equal(np.asarray(trained), np.asarray(part.resize((16, 16), BICUBIC)))
        assert transform.num_layers == 0


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6)])
def test_boxes_have_the_area_that_scale_says_and_lie_inside(scale):
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop(300, 200, rng, scale) for _ in range(500)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 300 and bottom.max() <= 200
    area = (right - left) * (bottom - top) / 60000
    spread = 0.1 * (scale[1] - scale[0])
    assert scale[0] - 0.01 < area.min() < scale[0] + spread and scale[1] - 2 * spread < area.max() < scale[1] + 0.01
    ratio = (right - left) / (bottom - top)
    assert 0.73 < ratio.min() and ratio.max() < 1.36


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"name": "tim"}, "there is no config.data.transform.name 'tim': did you mean 'timm'?"),
        ({"num_layers": 2}, "there is no config.data.transform.name '': choose from perceiver_io, timm."),
        (
            {"name": "perceiver_io", "layers": 2},
            "config.data.transform has no key 'layers': did you mean 'num_layers'?",
        ),
        ({"name": "perceiver_io", "magnitude": 11}, "RandAugment needs num_layers of at least 0 and a magnitude"),
        ({"name": "timm", "magnitude": 11}, "timm's RandAugment needs num_layers of at least 0, a magnitude"),
        (
            {"name": "timm", "crop_fraction": 87.5},
            "config.data.transform needs a crop_fraction above 0 and up to 1, but got 87.5.",
        ),
        ({"name": "timm", "scale": (0.5,)}, "config.data.transform needs two numbers as scale"),
        ({"name": "timm", "scale": (0.5, 0.2)}, "config.data.transform needs two numbers as scale"),
    ],
)
def test_mistakes_are_named(options, sentence):
    with pytest.raises(UsageError) as error:
        image_transform(options)
    assert str(error.value).startswith(sentence)
