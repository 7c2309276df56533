import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from xattn.data import image_operations


def images():
    """Noise of all levels and of few, one colour, a channel that is constant, two pixels and one; all read-only."""
    rng = np.random.default_rng(0)
    for number in range(60):
        shape = (*rng.integers(1, 50, 2), 3)
        image = [
            rng.integers(256, size=shape),
            rng.integers(100, 130, size=shape),
            np.broadcast_to(rng.integers(256, size=3), shape),
            np.clip(rng.normal(rng.uniform(0, 255), 30, shape), 0, 255) * [1, 1, 0],
        ][number % 4]
        yield read_only(image)
    yield read_only(np.array([[[0, 7, 255], [255, 9, 0]]]))
    yield read_only(np.array([[[3, 200, 90]]]))


def read_only(image):
    image = image.astype(np.uint8)
    image.flags.writeable = False
    return image


def check(ours, pillows, **arguments):
    for image in images():
        expected = np.asarray(pillows(Image.fromarray(image), **arguments))
        np.testing.assert_array_equal(ours(image, **arguments), expected)


def test_levels_are_mapped_as_pillow_maps_them():
    check(image_operations.auto_contrast, ImageOps.autocontrast)
    check(image_operations.equalize, ImageOps.equalize)
    check(image_operations.invert, ImageOps.invert)
    for bits in range(1, 9):
        check(image_operations.posterize, ImageOps.posterize, bits=bits)
    for first in (0, 1, 100, 255, 256):
        check(
            lambda image, first=first: image_operations.solarize(image, first),
            lambda image, t=first: ImageOps.solarize(image, t),
        )


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.55, 1.0, 1.3337, 1.9])
@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_images_are_enhanced_as_pillow_enhances_them(name, factor):
    enhance = getattr(ImageEnhance, name.title())
    check(lambda image: getattr(image_operations, name)(image, factor), lambda image: enhance(image).enhance(factor))


def test_no_bits_give_black_and_an_amount_stops_at_white():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    assert not image_operations.posterize(levels, 0).any()
    expected = [*range(200, 256), *[255] * 72, *range(128, 256)]
    np.testing.assert_array_equal(image_operations.solarize_add(levels, 200)[0, :, 1], expected)
