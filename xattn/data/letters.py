"""Letters: a set of images to classify that needs no download, drawn as GlyphFS is (see `xattn.data.glyphs`).

The 100 classes are the first letters of GlyphFS's training split that at least twelve of its faces hold. Each is drawn
40 times for every seed of the affine maps, in turn in all faces that hold it; the splits differ in their seeds:

    train   seeds 0 .. 9, 400 images a class         val   seed 10, 40 images a class         test   seed 11, the same

So a model is tested on maps that it has not seen, of letters and faces that it has.
"""

import os
from pathlib import Path

import jax
import numpy as np

from xattn import config
from xattn.data.checks import check_split
from xattn.data.glyphs import JITTERS, SAMPLES_PER_CLASS, load_or_render
from xattn.data.transforms import image_shapes

LETTERS = "ABCDEGHIJKLMNPQRSTUVWXYZabdefgkmnoqrtyÆØÞßæðþħŊŒƁƈƊƋƎƐƑƓƕƛƝƢƣƤƦƧƪƫƮƶƸƺƻƼƾƿǁǂǶȜȡȤȴȵȸȻȾȿɀɁɐɔɕɖɘəɚɜɝɞɠɣ"
_SEEDS = {"train": range(10), "val": range(10, 11), "test": range(11, 12)}
_SIZE = 32


class Letters:
    """Images of letters in grey: image uint8 [32, 32, 1], ink is 255, and label int32.

    Args:
      split: "train" (40,000 images), "val" or "test" (4,000 each).
      jitter: a key of `xattn.data.glyphs.JITTERS`.
      cache_dir: where the rendered images are kept; `xattn.config.cache_dir()` by default.

    Raises:
      UsageError: there is no such split or jitter.
    """

    name = "letters"
    class_names = tuple(f"U+{ord(letter):04X}" for letter in LETTERS)

    def __init__(self, split: str, jitter: str = "strong", cache_dir: str | os.PathLike | None = None):
        check_split(self.name, split)
        config.lookup(JITTERS, jitter, "jitter of letters")
        cache = Path(cache_dir or config.cache_dir()) / "glyphs"
        codes = tuple(map(ord, LETTERS))
        self.split = split
        self._images = [load_or_render(codes, jitter, seed, cache, "letters")[0] for seed in _SEEDS[split]]
        self.num_examples = sum(map(len, self._images))

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        """Image and label number `index`; the maps are part of the data, so `seed` changes nothing."""
        del seed
        draw, image = divmod(index, len(self._images[0]))
        return {"image": self._images[draw][image], "label": np.array(image // SAMPLES_PER_CLASS, np.int32)}

    @staticmethod
    def shapes(**_: object) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one example, told without rendering."""
        return image_shapes(_SIZE, _SIZE, 1)
