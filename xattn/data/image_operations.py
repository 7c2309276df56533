"""The operations that RandAugment draws from, on uint8 images: Pillow's, to the last level.

Operations on levels are NumPy's here: Pillow's hold Python's lock, so that threads that read images would wait for each
other. What moves or mixes pixels is Pillow's own.

    blend(a, b, f) = a + f (b - a), clipped to 0..255 and cut to an integer

Deviations: none from Pillow 13 on x86. Where the compiler fuses multiplication and addition, a level may differ by one.
"""

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageFilter

Pixels = UInt8[np.ndarray, "H W 3"]
Colour = tuple[int, int, int]

_LEVELS = np.arange(256)


def auto_contrast(image: Pixels) -> Pixels:
    """Each channel spread so that its darkest level becomes 0 and its brightest 255."""
    low, high = (reduce(reduce(image, 0), 0).astype(int)[:, None] for reduce in (np.min, np.max))
    scale = 255.0 / np.maximum(high - low, 1)
    spread = np.clip((_LEVELS * scale - low * scale).astype(int), 0, 255)
    return _by_channel(image, np.where(high > low, spread, _LEVELS))


def equalize(image: Pixels) -> Pixels:
    """Each channel mapped so that its levels are about equally frequent."""
    counts = np.array(Image.fromarray(image).histogram()).reshape(3, 256)
    tables = []
    for count in counts:
        step = (count.sum() - count[np.flatnonzero(count)[-1]]) // 255
        below = np.cumsum(count) - count
        tables.append(np.minimum((step // 2 + below) // step, 255) if step else _LEVELS)
    return _by_channel(image, np.stack(tables))


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
    size = (image.shape[1], image.shape[0])
    part = Image.fromarray(image).transform(size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)
    return np.asarray(part)


def rotate(image: Pixels, degrees: int | float, resample: Image.Resampling, fill: Colour) -> Pixels:
    """The image turned counterclockwise around its middle, with `fill` in the corners."""
    return np.asarray(Image.fromarray(image).rotate(degrees, resample, fillcolor=fill))


def _look_up(image: Pixels, table: Integer[np.ndarray, "256"]) -> Pixels:
    return np.take(table.astype(np.uint8), image)


def _by_channel(image: Pixels, tables: Integer[np.ndarray, "3 256"]) -> Pixels:
    return np.take(tables.astype(np.uint8), image + np.array([0, 256, 512], np.uint16))


def _grey(image: Pixels) -> UInt8[np.ndarray, "H W"]:
    red, green, blue = (image[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


def _blend(a: UInt8[np.ndarray, "..."], b: UInt8[np.ndarray, "*S"], factor: int | float) -> UInt8[np.ndarray, "*S"]:
    start = a.astype(np.float32)
    return np.clip(start + np.float32(factor) * (b - start), 0, 255).astype(np.uint8)
