"""RandAugment (arXiv 1909.13719): a few operations drawn at random, all of one strength.

Each layer applies one of the sixteen operations below, all equally likely. With m = magnitude / 10, in 0..1:

    AutoContrast, Equalize, Invert                     have no strength
    Rotate +-30 m degrees, ShearX and ShearY +-0.3 m, TranslateX and TranslateY +-100 m pixels   (either sign)
    Posterize to int(4 m) bits, at least 1, Solarize from int(256 m) on, SolarizeAdd int(110 m) below 128
    Color, Contrast, Brightness, Sharpness             by the factor 0.1 + 1.8 m
    Cutout                                             of a square of 2 int(40 m) pixels around a uniform point

What moves in from outside, and what is cut out, is grey (128). Nearest pixels, as in the source.

Source: Perceiver IO's ImageNet training (deepmind-research, perceiver/train/autoaugment.py): 4 layers of magnitude 5.

Deviations: that code computes Contrast's grey from the number of pixels instead of their mean, so that images of more
than 256 x 256 are blended with white; here it is the mean, as Pillow and the paper have it. The other operations are
Pillow's, which that code imitates.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from xattn.config import UsageError

_GREY = (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies `num_layers` random operations of strength `magnitude` (0 to 10) to an RGB image.

    Raises:
      UsageError: fewer than 0 layers, or a magnitude outside of 0..10.
    """

    num_layers: int = 4
    magnitude: int | float = 5

    def __post_init__(self):
        if self.num_layers < 0 or not 0 <= self.magnitude <= 10:
            raise UsageError(
                f"RandAugment needs num_layers of at least 0 and a magnitude from 0 to 10, but got {self.num_layers} "
                f"and {self.magnitude}."
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The augmented image, of the same size; `rng` chooses the operations, their signs and the place to cut."""
        for _ in range(self.num_layers):
            image = list(OPERATIONS.values())[rng.integers(len(OPERATIONS))](image, self.magnitude / 10, rng)
        return image


def _affine(image: Image.Image, *matrix: int | float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=_GREY)


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
    return image.point([min(255, value + amount) if value < 128 else value for value in range(256)] * 3)


def _cutout(image: Image.Image, half: int, rng: np.random.Generator) -> Image.Image:
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    if half:
        image = image.copy()
        ImageDraw.Draw(image).rectangle((x - half, y - half, x + half - 1, y + half - 1), fill=_GREY)
    return image


# Name: the operation on an image, with strength m in 0..1.
OPERATIONS = {
    "auto_contrast": lambda image, m, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, m, rng: ImageOps.equalize(image),
    "invert": lambda image, m, rng: ImageOps.invert(image),
    "rotate": lambda image, m, rng: image.rotate(_sign(rng) * 30 * m, fillcolor=_GREY),
    "posterize": lambda image, m, rng: ImageOps.posterize(image, max(1, int(4 * m))),
    "solarize": lambda image, m, rng: ImageOps.solarize(image, int(256 * m)),
    "color": lambda image, m, rng: ImageEnhance.Color(image).enhance(0.1 + 1.8 * m),
    "contrast": lambda image, m, rng: ImageEnhance.Contrast(image).enhance(0.1 + 1.8 * m),
    "brightness": lambda image, m, rng: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * m),
    "sharpness": lambda image, m, rng: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * m),
    "shear_x": lambda image, m, rng: _affine(image, 1, _sign(rng) * 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda image, m, rng: _affine(image, 1, 0, 0, _sign(rng) * 0.3 * m, 1, 0),
    "translate_x": lambda image, m, rng: _affine(image, 1, 0, _sign(rng) * 100 * m, 0, 1, 0),
    "translate_y": lambda image, m, rng: _affine(image, 1, 0, 0, 0, 1, _sign(rng) * 100 * m),
    "cutout": lambda image, m, rng: _cutout(image, int(40 * m), rng),
    "solarize_add": lambda image, m, rng: _solarize_add(image, int(110 * m)),
}
