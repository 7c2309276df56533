"""Image transforms of the few-shot literature: Pillow image in, uint8 [S, S, 3] out.

The pair that DeepEMD (arXiv 2003.06777) and QSFormer (arXiv 2208.12398) use in their code, at any size.
"""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
    """A random part of the image, scaled to size x size and mirrored half of the time.

    The part has 8 to 100 % of the area and an aspect ratio in 3/4..4/3, uniform in its logarithm. After ten
    draws that don't fit into the image, the largest central part with an allowed ratio is taken
    (torchvision's RandomResizedCrop with its default arguments, then RandomHorizontalFlip).
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
    pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box))
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The central size x size of the image scaled to a square 92/84 of that (92 for the usual 84).

    Deviations: none from the released code, which also scales both sides to 92 whatever the aspect ratio.
    """
    whole = round(size * 92 / 84)
    pixels = np.asarray(image.convert("RGB").resize((whole, whole), Image.Resampling.BILINEAR))
    first = round((whole - size) / 2)
    return pixels[first : first + size, first : first + size]
