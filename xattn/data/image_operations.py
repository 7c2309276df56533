"""The operations that RandAugment draws from, on uint8 images: Pillow's, to the last level.

Blends and tables of levels are NumPy's here: `PIL.Image.blend`, and the loops over levels in which Pillow's helpers are
written, hold Python's lock, so that threads that read images wait for each other. All else is Pillow's own.

    blend(a, b, f) = a + f (b - a), clipped to 0..255 and cut to an integer

Deviations: none from Pillow on x86. Where compilers fuse multiplication and addition, blends may differ by one level.
"""

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageFilter, ImageOps

Pixels = UInt8[np.ndarray, "H W 3"]
Colour = tuple[int, int, int]

_LEVELS = np.arange(256)


def auto_contrast(image: Pixels) -> Pixels:
    """Each channel spread so that its darkest level becomes 0 and its brightest 255."""
    return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def equalize(image: Pixels) -> Pixels:
    """Each channel mapped so that its levels are about equally frequent."""
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def invert(image: Pixels) -> Pixels:
    """255 - v."""
    return 255 - image


def posterize(image: Pixels, bits: int) -> Pixels:
    """The highest `bits` of each level, 0 to 8."""
    return image & np.uint8(256 - (256 >> bits))


def solarize(image: Pixels, first: int) -> Pixels:
    """Levels from `first` on inverted."""
    return _look_up(image, np.where(_LEVELS < first, _LEVELS, 255 - _LEVELS))


def solarize_add(image: Pixels, amount: int) -> Pixels:
    """`amount` added to levels below 128, up to 255."""
    return _look_up(image, np.where(_LEVELS < 128, np.minimum(_LEVELS + amount, 255), _LEVELS))


def color(image: Pixels, factor: int | float) -> Pixels:
    """blend(grey, image, factor), with the grey (luma) of each pixel."""
    return _blend(_grey(image)[..., None], image, factor)


def contrast(image: Pixels, factor: int | float) -> Pixels:
    """blend(mean, image, factor), with the mean grey of the image."""
    mean = np.array([_grey(image).mean() + 0.5]).astype(np.uint8)
    return _look_up(image, _blend(mean, _LEVELS.astype(np.uint8), factor))


def brightness(image: Pixels, factor: int | float) -> Pixels:
    """blend(black, image, factor)."""
    return _look_up(image, _blend(np.zeros(1, np.uint8), _LEVELS.astype(np.uint8), factor))


def sharpness(image: Pixels, factor: int | float) -> Pixels:
    """blend(smooth, image, factor), with Pillow's smoothing by 3 x 3 pixels."""
    return _blend(np.asarray(Image.fromarray(image).filter(ImageFilter.SMOOTH)), image, factor)


def affine(image: Pixels, matrix: tuple[int | float, ...], resample: Image.Resampling, fill: Colour) -> Pixels:
    """Pixel (x, y) reads (a x + b y + c, d x + e y + f) of matrix (a, b, c, d, e, f), or `fill` outside."""
    whole = Image.fromarray(image)
    return np.asarray(whole.transform(whole.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill))


def rotate(image: Pixels, degrees: int | float, resample: Image.Resampling, fill: Colour) -> Pixels:
    """The image turned counterclockwise around its middle, with `fill` in the corners."""
    return np.asarray(Image.fromarray(image).rotate(degrees, resample, fillcolor=fill))


def _look_up(image: Pixels, table: Integer[np.ndarray, "256"]) -> Pixels:
    return np.take(table.astype(np.uint8), image)


def _grey(image: Pixels) -> UInt8[np.ndarray, "H W"]:
    return np.asarray(Image.fromarray(image).convert("L"))


def _blend(a: UInt8[np.ndarray, "..."], b: UInt8[np.ndarray, "*S"], factor: float) -> UInt8[np.ndarray, "*S"]:
    start = a.astype(np.float32)
    return np.clip(start + np.float32(factor) * (b - start), 0, 255).astype(np.uint8)
