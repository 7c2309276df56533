"""Mixing the images of a batch in pairs: mixup (arXiv 1710.09412) blends two, CutMix (1905.04899) pastes a box.

A mixed image is r of image_i and 1 - r of another one, and so is its target: r onehot(label_i) + (1 - r) onehot(other).

    mixup    image = r image_i + (1 - r) other,   r ~ Beta(alpha, alpha)
    CutMix   image = one of them inside a box and the other one outside, r = image_i's part of the area

`mixup_cutmix` mixes row i with row i - 1 (the first with the last) of the rows that this host holds, in the first half
of the batch by mixup, in the second by CutMix; image_i is inside. The box is centred at a uniform point, has sqrt(u) of
the height and width with u ~ U(0, 1), and is cut off at the border.

`mixup_or_cutmix` does one or the other to the whole batch, with one r for all: row i is mixed with row B - 1 - i of the
rows that this host holds. For CutMix u = 1 - Beta(alpha, alpha), and the other image is inside.

Sources: Perceiver IO's ImageNet training (deepmind-research, perceiver/train/dataset.py), alpha 0.2, for the first;
timm (timm/data/mixup.py, mode "batch"), as DeiT and CrossViT train, for the second.

Deviations: images are uint8, so a blend is rounded, an error of at most half a level of 255, as in timm's
FastCollateMixup; DeepMind's code and timm's Mixup blend float images. DeepMind's code draws two images for each mixed
one, where we mix those of a batch with each other. timm refuses an odd batch; here its middle row is mixed with itself.
The box is that of timm 1.0.31; in older releases one of odd height or width is smaller by a row or column.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from xattn.config import UsageError


def mixup_cutmix(
    batch: dict[str, np.ndarray], seeds: Shaped[np.ndarray, "B"], /, *, alpha: float = 0.2
) -> dict[str, np.ndarray]:
    """Mixes one half of a batch by mixup and the other by CutMix, each row with a share of its own.

    Args:
      batch: with image uint8 [B, H, W, C] and label int32 [B].
      seeds: what happens to row i is drawn from `default_rng(seeds[i])`.
      alpha: of mixup's Beta distribution.

    Returns:
      The batch with image uint8 (mixed), label int32 [B], label_b int32 [B] and mix float32 [B], the share of
      `label`; that of `label_b` is 1 - mix.

    Raises:
      UsageError: the batch has no images with labels, or alpha is not positive.
    """
    _check_fields("mixup_cutmix", batch)
    if alpha <= 0:
        raise UsageError(f"mixup_cutmix needs an alpha above 0, but got {alpha}.")
    images, labels = batch["image"], batch["label"]
    mixed, mix = np.empty_like(images), np.empty(len(images), np.float32)
    for row, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        one, other = images[row], images[row - 1]
        if row < (len(images) + 1) // 2:
            mix[row] = rng.beta(alpha, alpha)
            mixed[row] = np.rint(mix[row] * one + (1 - mix[row]) * other)
        else:
            side = np.sqrt(rng.random())
            box, mix[row] = _box(rng, one.shape[:2], [int(side * length) // 2 * 2 for length in one.shape[:2]])
            mixed[row] = other
            mixed[row][box] = one[box]
    return batch | {"image": mixed, "label_b": np.roll(labels, 1), "mix": mix}


def mixup_or_cutmix(
    batch: dict[str, np.ndarray],
    seeds: Shaped[np.ndarray, "B"],
    /,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
) -> dict[str, np.ndarray]:
    """Mixes a whole batch by mixup or by CutMix, with one share for all rows.

    Args:
      batch: with image uint8 [B, H, W, C] and label int32 [B].
      seeds: what happens is drawn from `default_rng(seeds[0])`.
      mixup_alpha, cutmix_alpha: of the Beta distributions; 0 leaves that kind out.
      probability: of a batch to be mixed at all.
      switch_probability: of CutMix in a batch that is mixed, where neither alpha is 0.

    Returns:
      The batch with the fields that `mixup_cutmix` gives.

    Raises:
      UsageError: the batch has no images with labels, or they are mixed already; an alpha is negative or both are 0;
        or a probability is not in [0, 1].
    """
    _check_fields("mixup_or_cutmix", batch)
    if "mix" in batch:
        raise UsageError(
            "mixup_cutmix and mixup_or_cutmix can't both mix a batch: take one of them out of "
            "config.pipeline.transforms."
        )
    if min(mixup_alpha, cutmix_alpha) < 0 or mixup_alpha == cutmix_alpha == 0:
        raise UsageError(
            "mixup_or_cutmix needs a mixup_alpha and a cutmix_alpha of at least 0, and not both 0, but got "
            f"{mixup_alpha} and {cutmix_alpha}."
        )
    if not (0 <= probability <= 1 and 0 <= switch_probability <= 1):
        raise UsageError(
            "mixup_or_cutmix needs a probability and a switch_probability from 0 to 1, but got "
            f"{probability} and {switch_probability}."
        )
    rng = np.random.default_rng(seeds[0])
    images, labels = batch["image"], batch["label"]
    mixed, share = images.copy(), 1.0
    if rng.random() < probability:
        both = mixup_alpha > 0 and cutmix_alpha > 0
        cutmix = rng.random() < switch_probability if both else cutmix_alpha > 0
        if cutmix:
            side = np.sqrt(1 - rng.beta(cutmix_alpha, cutmix_alpha))
            box, part = _box(rng, images.shape[1:3], [int(side * length) for length in images.shape[1:3]])
            share = 1 - part
            mixed[:, *box] = images[::-1, *box]
        else:
            share = rng.beta(mixup_alpha, mixup_alpha)
            for row, (one, other) in enumerate(zip(images, images[::-1], strict=True)):
                mixed[row] = np.rint(share * one.astype(np.float32) + (1 - share) * other.astype(np.float32))
    return batch | {"image": mixed, "label_b": labels[::-1].copy(), "mix": np.full(len(labels), share, np.float32)}


def _check_fields(name: str, batch: dict[str, np.ndarray]) -> None:
    if not {"image", "label"} <= batch.keys():
        raise UsageError(
            f"{name} mixes images and their labels, but the data has {', '.join(batch)}: take "
            f"config.pipeline.transforms.{name} away, or choose a source of labelled images."
        )


def _box(rng: np.random.Generator, sizes: Sequence[int], lengths: Sequence[int]) -> tuple[tuple[slice, ...], float]:
    """A box around a uniform point of an image, cut off at the border, and the part of the image that it covers."""
    bounds, area = [], 1
    for size, length in zip(sizes, lengths, strict=True):
        centre = int(rng.integers(size))
        first, end = max(centre - length // 2, 0), min(centre + (length + 1) // 2, size)
        bounds.append(slice(first, end))
        area *= end - first
    return tuple(bounds), area / math.prod(sizes)
