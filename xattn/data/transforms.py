"""Image transforms: Pillow image in, uint8 [S, S, 3] out.

`random_resized_crop` and `center_crop` are the pair that DeepEMD (arXiv 2003.06777) and QSFormer (arXiv 2208.12398)
use in their code. Labelled images choose one of these by its name, for training and for evaluation:

    perceiver_io   (arXiv 2107.14795)
      training     a random part, mirrored half of the time, RandAugment, then scaled (bicubic)
      evaluation   `eval_crop`
    timm           (timm 1.0: what DeiT, arXiv 2012.12877, and CrossViT, 2103.14899, train and evaluate with)
      training     a random part, mirrored half of the time, scaled (bicubic), then timm's RandAugment
      evaluation   the shorter side scaled (bicubic) to floor(S / crop_fraction), then the central square

Deviations: DeepMind's code scales without a low-pass filter and in float32, where values go beyond 0..255; Pillow
filters when it makes an image smaller and gives uint8. timm draws how a part is scaled, bilinear or bicubic, unless it
is told; here it is bicubic, as DeiT and CrossViT tell it. It mirrors after scaling, which gives the same pixels. A part
that was scaled when it was decoded (decoder="fast") comes to Perceiver IO's RandAugment after scaling, not before.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from xattn.config import UsageError, check_options, lookup
from xattn.data.randaugment import RandAugment
from xattn.data.timm_augment import TimmRandAugment


def draw_crop(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float] = (0.08, 1.0)
) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of a random part of an image.

    The part has `scale` of the area (8 to 100 %) and an aspect ratio in 3/4..4/3, uniform in its logarithm. After ten
    draws that don't fit into the image, the largest central part with an allowed ratio is taken (torchvision's
    RandomResizedCrop).
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
    """The part of the image that `draw_crop` draws, scaled to size x size (bilinear) and mirrored half of the time."""
    box = draw_crop(*image.size, rng)
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


def eval_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The central square of size / (size + 32) of the shorter side, scaled to size x size (bicubic).

    For 224 this is what the published Perceiver weights were evaluated with: 224 / 256 of the shorter side.

    Deviations: none from transformers' PerceiverImageProcessor (crop_size 256, size 224). DeepMind's code rounds
    the corner of the square up where that one rounds it down, and scales without a low-pass filter.
    """
    side = int(size / (size + 32) * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(_scaled(square, size))


@runtime_checkable
class ImageTransform(Protocol):
    """What a source of labelled images does to an image of any size.

    Training cuts out `draw_crop(width, height, rng, scale)`, mirrors this part half of the time and gives it to
    `train`, which scales it and applies `num_layers` random operations. A part that was scaled when it was decoded
    comes with size x size pixels already, and without layers is not given to `train`. Evaluation gives the whole image
    to `evaluate`.
    """

    scale: tuple[float, float]
    num_layers: int

    def train(self, part: Image.Image, size: int, rng: np.random.Generator) -> Image.Image: ...

    def evaluate(self, image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]: ...


class PerceiverTransform:
    """Perceiver IO's transform; num_layers and magnitude are those of `xattn.data.randaugment.RandAugment`."""

    scale = (0.08, 1.0)

    def __init__(self, num_layers: int = 4, magnitude: int | float = 5):
        self.num_layers = num_layers
        self._augment = RandAugment(num_layers, magnitude)

    def train(self, part: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        return _scaled(self._augment(part, rng), size)

    def evaluate(self, image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
        return eval_crop(image, size)


class TimmTransform:
    """timm's transform.

    Args:
      num_layers, magnitude, magnitude_std: of `xattn.data.timm_augment.TimmRandAugment`; 0 layers for none.
      crop_fraction: the part of the shorter side that evaluation shows; timm's crop_pct.
      scale: the smallest and the largest part of the area that training shows.

    Raises:
      UsageError: crop_fraction or scale is not in (0, 1], or RandAugment refuses.
    """

    def __init__(
        self,
        num_layers: int = 2,
        magnitude: int | float = 9,
        magnitude_std: int | float = 0.5,
        crop_fraction: float = 0.875,
        scale: tuple[float, ...] = (0.08, 1.0),
    ):
        if not 0 < crop_fraction <= 1:
            raise UsageError(
                f"config.data.transform needs a crop_fraction above 0 and up to 1, but got {crop_fraction}."
            )
        match scale:
            case (smallest, largest) if 0 < smallest <= largest <= 1:
                self.scale = (smallest, largest)
            case _:
                raise UsageError(
                    "config.data.transform needs two numbers as scale, the smallest part of the area above 0 and the "
                    f"largest up to 1, but got {scale}."
                )
        self.num_layers = num_layers
        self._crop_fraction = crop_fraction
        self._augment = TimmRandAugment(num_layers, magnitude, magnitude_std)

    def train(self, part: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
        return self._augment(_scaled(part, size), rng)

    def evaluate(self, image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
        shorter = math.floor(size / self._crop_fraction)
        width, height = (int(shorter * side / min(image.size)) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        whole = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(whole.crop((left, top, left + size, top + size)))


IMAGE_TRANSFORMS = {
    "perceiver_io": PerceiverTransform,
    "timm": TimmTransform,
}


def image_transform(options: Mapping[str, Any] | None) -> ImageTransform:
    """The transform that `options` describes: its `name` and its keywords; None is Perceiver IO's without RandAugment.

    Raises:
      UsageError: there is no such transform or keyword, or it refuses a value.
    """
    keywords = {"name": "perceiver_io", "num_layers": 0} if options is None else dict(options)
    transform = lookup(IMAGE_TRANSFORMS, keywords.pop("name", ""), "config.data.transform.name")
    check_options(keywords, transform, "config.data.transform")
    return transform(**keywords)


def image_shapes(height: int, width: int, channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of an example that is an image with a label."""
    return {
        "image": jax.ShapeDtypeStruct((height, width, channels), np.uint8),
        "label": jax.ShapeDtypeStruct((), np.int32),
    }


def _scaled(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)
