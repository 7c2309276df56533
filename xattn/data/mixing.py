"""mixup (arXiv 1710.09412) on one half of a batch of images, CutMix (arXiv 1905.04899) on the other.

Row i is mixed with row i - 1 (the first with the last) of the rows that this host holds:

    first half    image = r image_i + (1 - r) image_{i-1},               r ~ Beta(alpha, alpha)
    second half   image = image_i inside a box, image_{i-1} outside,     r = the box's part of the area

and the target is r onehot(label_i) + (1 - r) onehot(label_{i-1}). The box is centred at a uniform point, has
sqrt(u) of the height and width with u ~ U(0, 1), and is cut off at the border.

Source: Perceiver IO's ImageNet training (deepmind-research, perceiver/train/dataset.py), alpha 0.2.

Deviations: it draws two images for each mixed one, where we mix those of a batch with each other; it mixes float
images, where ours are rounded to uint8, an error of at most half a level of 255.
"""

import numpy as np
from jaxtyping import Shaped

from xattn.config import UsageError


def mixup_cutmix(
    batch: dict[str, np.ndarray], seeds: Shaped[np.ndarray, "B"], /, *, alpha: float = 0.2
) -> dict[str, np.ndarray]:
    """Mixes the images of a batch in pairs.

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
    if not {"image", "label"} <= batch.keys():
        raise UsageError(
            f"mixup_cutmix mixes images and their labels, but the data has {', '.join(batch)}: take "
            "config.pipeline.transforms.mixup_cutmix away, or choose a source of labelled images."
        )
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
            rows, columns = _box(rng, *one.shape[:2])
            mixed[row] = other
            mixed[row, rows, columns] = one[rows, columns]
            mix[row] = (rows.stop - rows.start) * (columns.stop - columns.start) / one[..., 0].size
    return batch | {"image": mixed, "label_b": np.roll(labels, 1), "mix": mix}


def _box(rng: np.random.Generator, height: int, width: int) -> tuple[slice, slice]:
    side = np.sqrt(rng.random())
    bounds = []
    for size in (height, width):
        centre, half = int(rng.integers(size)), int(side * size) // 2
        bounds.append(slice(max(centre - half, 0), min(centre + half, size)))
    return bounds[0], bounds[1]
