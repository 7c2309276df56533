"""Random erasing (arXiv 1708.04896): a box of some images of a batch becomes noise.

An image is chosen with a probability. The box has 2 to 33.3 % of its area and an aspect ratio (height to width) in
0.3..1/0.3, uniform in its logarithm; up to ten boxes are drawn until one is smaller than the image in both directions,
and its place is uniform. Each pixel and channel in it is drawn from N(0, 1), in units of the normalised image.

Source: timm 1.0 (timm/data/random_erasing.py), mode "pixel" with one box, as DeiT and CrossViT train.

Deviations: it erases in the normalised float image, where ours is uint8: the noise is mean + std N(0, 1), rounded and
cut off at 0 and 255. With ImageNet's mean and std, 0.4 to 3.6% of the noise lie beyond on a side, by channel.
"""

import math

import numpy as np
from jaxtyping import Shaped

from xattn.config import UsageError


def random_erasing(
    batch: dict[str, np.ndarray],
    seeds: Shaped[np.ndarray, "B"],
    /,
    *,
    probability: float = 0.25,
    mean: tuple[float, ...] | float = (0.485, 0.456, 0.406),
    std: tuple[float, ...] | float = (0.229, 0.224, 0.225),
) -> dict[str, np.ndarray]:
    """Fills a box of some images with noise.

    Args:
      batch: with image uint8 [B, H, W, C].
      seeds: what happens to row i is drawn from `default_rng([seeds[i], 1])`.
      probability: of an image to be erased.
      mean, std: of the pixels in [0, 1], one number or one a channel, as the task normalises them.

    Returns:
      The batch with image uint8 [B, H, W, C].

    Raises:
      UsageError: the batch has no images, the probability is not in [0, 1], or mean and std don't fit the channels.
    """
    if "image" not in batch:
        raise UsageError(
            f"random_erasing erases parts of images, but the data has {', '.join(batch)}: take "
            "config.pipeline.transforms.random_erasing away, or choose a source of images."
        )
    if not 0 <= probability <= 1:
        raise UsageError(f"random_erasing needs a probability from 0 to 1, but got {probability}.")
    images = batch["image"].copy()
    channels = images.shape[-1]
    if not {np.size(mean), np.size(std)} <= {1, channels}:
        raise UsageError(
            f"random_erasing got a mean of {np.size(mean)} and a std of {np.size(std)} numbers for images of "
            f"{channels} channels: give one number, or one a channel."
        )
    for image, seed in zip(images, seeds, strict=True):
        rng = np.random.default_rng([seed, 1])  # not [seed]: mixing draws from that
        if rng.random() < probability and (box := _box(rng, *image.shape[:2])):
            noise = np.add(mean, np.multiply(std, rng.standard_normal(image[box].shape)))
            image[box] = np.clip(np.rint(255 * noise), 0, 255)
    return batch | {"image": images}


def _box(rng: np.random.Generator, height: int, width: int) -> tuple[slice, slice] | None:
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * (height * width)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return slice(top, top + h), slice(left, left + w)
    return None
