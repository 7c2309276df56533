"""RandAugment (arXiv 1909.13719) as timm has it: "rand-m9-mstd0.5-inc1", the one that DeiT and CrossViT train with.

`num_layers` operations are drawn with replacement; each is applied half of the time, with a strength of its own:

    m = clip(N(magnitude, magnitude_std), 0, 10) / 10, and a sign s that is -1 half of the time

    auto_contrast, equalize, invert                    have no strength
    rotate                                             s 30 m degrees
    shear_x, shear_y                                   s 0.3 m
    translate_x, translate_y                           s 0.45 m of the width, the height
    posterize                                          to 4 - int(4 m) bits
    solarize                                           inverts from 256 - int(256 m) on
    solarize_add                                       adds int(110 m) below 128, up to 255
    color, contrast, brightness, sharpness             by the factor max(0.1, 1 + s 0.9 m)

The larger m, the stronger all of them are (timm's "inc1"). What moves in from outside has ImageNet's mean colour.

Source: timm 1.0 (timm/data/auto_augment.py), whose hyperparameters timm/data/transforms_factory.py sets.

Deviations: turned and sheared images are read bicubic, which is what timm does where the crop is scaled so, as here;
its default "random" chooses between bilinear and bicubic for both. Zero bits give a black image, as in timm with
older releases of Pillow; Pillow 13 refuses them, and timm fails with it.
"""

import dataclasses

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from xattn.config import UsageError

_MEAN_COLOUR = (124, 116, 104)


@dataclasses.dataclass(frozen=True)
class TimmRandAugment:
    """Applies up to `num_layers` random operations to an RGB image.

    Attributes:
      num_layers: how many operations are drawn; 0 leaves the image as it is.
      magnitude, magnitude_std: mean and standard deviation of the strength, on a scale of 0 to 10.

    Raises:
      UsageError: fewer than 0 layers, a magnitude outside of 0..10, or a negative deviation.
    """

    num_layers: int = 2
    magnitude: int | float = 9
    magnitude_std: int | float = 0.5

    def __post_init__(self):
        if self.num_layers < 0 or not 0 <= self.magnitude <= 10 or self.magnitude_std < 0:
            raise UsageError(
                "timm's RandAugment needs num_layers of at least 0, a magnitude from 0 to 10 and a magnitude_std of at "
                f"least 0, but got {self.num_layers}, {self.magnitude} and {self.magnitude_std}."
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The augmented image, of the same size; `rng` chooses the operations, whether they act, and how strongly."""
        for operation in rng.choice(list(OPERATIONS), self.num_layers):
            if rng.random() < 0.5:
                strength = np.clip(rng.normal(self.magnitude, self.magnitude_std), 0, 10) / 10
                image = OPERATIONS[operation](image, float(strength) * (1 if rng.random() < 0.5 else -1))
        return image


def _affine(image: Image.Image, *matrix: int | float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=_MEAN_COLOUR)


def _points(image: Image.Image, values: np.ndarray) -> Image.Image:
    """The image whose level v, 0 to 255, becomes values[v] in every channel."""
    return image.point(values.tolist() * 3)


def _factor(m: float) -> float:
    return max(0.1, 1 + 0.9 * m)


_LEVELS = np.arange(256)

# Name: the operation on an image, with m in -1..1, the strength and its sign.
OPERATIONS = {
    "auto_contrast": lambda image, m: ImageOps.autocontrast(image),
    "equalize": lambda image, m: ImageOps.equalize(image),
    "invert": lambda image, m: ImageOps.invert(image),
    "rotate": lambda image, m: image.rotate(30 * m, Image.Resampling.BICUBIC, fillcolor=_MEAN_COLOUR),
    "posterize": lambda image, m: _points(image, _LEVELS & -(16 << int(4 * abs(m)))),
    "solarize": lambda image, m: ImageOps.solarize(image, 256 - int(256 * abs(m))),
    "solarize_add": lambda image, m: _points(
        image, np.where(_LEVELS < 128, np.minimum(_LEVELS + int(110 * abs(m)), 255), _LEVELS)
    ),
    "color": lambda image, m: ImageEnhance.Color(image).enhance(_factor(m)),
    "contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(_factor(m)),
    "brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(_factor(m)),
    "sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(_factor(m)),
    "shear_x": lambda image, m: _affine(image, 1, 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda image, m: _affine(image, 1, 0, 0, 0.3 * m, 1, 0),
    "translate_x": lambda image, m: _affine(image, 1, 0, 0.45 * m * image.width, 0, 1, 0),
    "translate_y": lambda image, m: _affine(image, 1, 0, 0, 0, 1, 0.45 * m * image.height),
}
