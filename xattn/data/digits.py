"""Handwritten digits, 8 x 8 pixels: the set that comes with scikit-learn, so nothing is downloaded.

1797 images of ten classes (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits). Of the images of
a class, in the order of the file, every tenth goes to val, the two after it to test, and the other seven to train.
"""

import functools

import jax
import numpy as np

from xattn.config import UsageError
from xattn.data.checks import check_split
from xattn.data.transforms import image_shapes

_SIZE = 8
_PARTS = {"val": (0,), "test": (1, 2), "train": (3, 4, 5, 6, 7, 8, 9)}


class Digits:
    """Images of digits in grey: image uint8 [8, 8, 1], ink is 255, and label int32, the digit.

    Args:
      split: "train" (1248 images), "val" (185) or "test" (364).
      permute_pixels: the seed of one permutation of the 64 places, the same for all images, which takes the
        neighbourhood of pixels away; None leaves them where they are.

    Raises:
      UsageError: there is no such split, or scikit-learn is not installed.
    """

    name = "digits"
    class_names = tuple("0123456789")

    def __init__(self, split: str, permute_pixels: int | None = None):
        check_split(self.name, split)
        if permute_pixels is not None and permute_pixels < 0:
            raise UsageError(f"Digits needs a permute_pixels of at least 0, but got {permute_pixels}.")
        pixels, labels = _load()
        rank = np.empty_like(labels)
        for label in range(10):
            rank[labels == label] = np.arange((labels == label).sum())
        chosen = np.isin(rank % 10, _PARTS[split])
        pixels = pixels[chosen]
        if permute_pixels is not None:
            pixels = pixels[:, np.random.default_rng(permute_pixels).permutation(_SIZE * _SIZE)]
        self.split = split
        self._images = pixels.reshape(-1, _SIZE, _SIZE, 1)
        self.labels = labels[chosen]
        self.num_examples = len(self.labels)

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        """Image and label number `index`; there is no augmentation, so `seed` changes nothing."""
        del seed
        return {"image": self._images[index], "label": np.asarray(self.labels[index])}

    @staticmethod
    def shapes(**_: object) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one example, told without opening the data."""
        return image_shapes(_SIZE, _SIZE, 1)


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [1797, 64] and labels int32 [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            "the digits come with scikit-learn, which is not installed: pip install 'xattn[digits]'."
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    return np.rint(pixels * (255 / 16)).astype(np.uint8), labels.astype(np.int32)
