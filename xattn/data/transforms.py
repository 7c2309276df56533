"""Image transforms: Pillow image in, uint8 [S, S, 3] out.

`random_resized_crop` (bilinear) and `center_crop` are the pair that DeepEMD (arXiv 2003.06777) and QSFormer
(arXiv 2208.12398) use in their code; `random_resized_crop` (bicubic) and `eval_crop` are Perceiver IO's
(arXiv 2107.14795).
"""

import math
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
    augment: Callable[[Image.Image, np.random.Generator], Image.Image] | None = None,
) -> UInt8[np.ndarray, "S S 3"]:
    """A random part of the image, scaled to size x size and mirrored half of the time.

    The part has 8 to 100 % of the area and an aspect ratio in 3/4..4/3, uniform in its logarithm. After ten
    draws that don't fit into the image, the largest central part with an allowed ratio is taken
    (torchvision's RandomResizedCrop with its default arguments, then RandomHorizontalFlip). With `augment`
    the part is mirrored, given to it and scaled, in this order.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    if augment is None:
        pixels = np.asarray(image.convert("RGB").resize((size, size), resampling, box=box))
        return pixels[:, ::-1] if rng.random() < 0.5 else pixels
    part = image.convert("RGB").crop(box)
    part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part
    return np.asarray(augment(part, rng).resize((size, size), resampling))


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The central size x size of the image scaled to a square 92/84 of that (92 for the usual 84).

    Deviations: none from the released code, which also scales both sides to 92 whatever the aspect ratio.
    """
    whole = round(size * 92 / 84)
    pixels = np.asarray(image.convert("RGB").resize((whole, whole), Image.Resampling.BILINEAR))
    first = round((whole - size) / 2)
    return pixels[first : first + size, first : first + size]


def eval_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The central square of size / (size + 32) of the shorter side, scaled to size x size (bicubic).

    For 224 this is what the published Perceiver weights were evaluated with: 224 / 256 of the shorter side.

    Deviations: none from transformers' PerceiverImageProcessor (crop_size 256, size 224). DeepMind's code rounds
    the corner of the square up where that one rounds it down, and scales without a low-pass filter.
    """
    side = int(size / (size + 32) * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def image_shapes(height: int, width: int, channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of an example that is an image with a label."""
    return {
        "image": jax.ShapeDtypeStruct((height, width, channels), np.uint8),
        "label": jax.ShapeDtypeStruct((), np.int32),
    }
