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
from PIL import Image

from xattn.config import UsageError
from xattn.data import image_operations
from xattn.data.image_operations import Pixels

_GREY = (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies `num_layers` random operations of strength `magnitude` (0 to 10) to an image uint8 [H, W, 3].

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

    def __call__(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        """The augmented image, of the same size; `rng` chooses the operations, their signs and the place to cut."""
        for _ in range(self.num_layers):
            image = list(OPERATIONS.values())[rng.integers(len(OPERATIONS))](image, self.magnitude / 10, rng)
        return image


def _affine(image: Pixels, *matrix: int | float) -> Pixels:
    return image_operations.affine(image, matrix, Image.Resampling.NEAREST, _GREY)


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


def _cutout(image: Pixels, half: int, rng: np.random.Generator) -> Pixels:
    x, y = int(rng.integers(image.shape[1])), int(rng.integers(image.shape[0]))
    image = image.copy()
    image[max(0, y - half) : y + half, max(0, x - half) : x + half] = _GREY
    return image


# Name: the operation on an image, with strength m in 0..1.
OPERATIONS = {
    "auto_contrast": lambda image, m, rng: image_operations.auto_contrast(image),
    "equalize": lambda image, m, rng: image_operations.equalize(image),
    "invert": lambda image, m, rng: image_operations.invert(image),
    "rotate": lambda image, m, rng: image_operations.rotate(
        image, _sign(rng) * 30 * m, Image.Resampling.NEAREST, _GREY
    ),
    "posterize": lambda image, m, rng: image_operations.posterize(image, max(1, int(4 * m))),
    "solarize": lambda image, m, rng: image_operations.solarize(image, int(256 * m)),
    "color": lambda image, m, rng: image_operations.color(image, 0.1 + 1.8 * m),
    "contrast": lambda image, m, rng: image_operations.contrast(image, 0.1 + 1.8 * m),
    "brightness": lambda image, m, rng: image_operations.brightness(image, 0.1 + 1.8 * m),
    "sharpness": lambda image, m, rng: image_operations.sharpness(image, 0.1 + 1.8 * m),
    "shear_x": lambda image, m, rng: _affine(image, 1, _sign(rng) * 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda image, m, rng: _affine(image, 1, 0, 0, _sign(rng) * 0.3 * m, 1, 0),
    "translate_x": lambda image, m, rng: _affine(image, 1, 0, _sign(rng) * 100 * m, 0, 1, 0),
    "translate_y": lambda image, m, rng: _affine(image, 1, 0, 0, 0, 1, _sign(rng) * 100 * m),
    "cutout": lambda image, m, rng: _cutout(image, int(40 * m), rng),
    "solarize_add": lambda image, m, rng: image_operations.solarize_add(image, int(110 * m)),
}
