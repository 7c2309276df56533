"""What all sources of labelled images share: reading, cropping, augmenting, and what happens to a damaged image."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from xattn.config import UsageError
from xattn.data.checks import check_root, check_split
from xattn.data.decode import Box, fast_crop, fast_libraries, mirror
from xattn.data.transforms import draw_crop, image_shapes, image_transform

_DECODERS = ("pillow", "fast")


class LabelledImages:
    """A source of examples with image uint8 [S, S, 3] and label int32; a subclass tells where they come from.

    Args:
      split: "train", "val" or "test".
      root: the folder that holds the data.
      image_size: S.
      transform: a name in `xattn.data.transforms.IMAGE_TRANSFORMS` and its keywords; None for Perceiver IO's without
        RandAugment.
      skip_damaged: let the next image take the place of one that can't be read, with a warning that counts them.
      decoder: how the parts that training shows are read. "pillow" decodes the whole image; "fast" decodes no more of a
        JPEG than S pixels need, which changes them a little, and scales before anything else (`xattn.data.decode`).

    Raises:
      UsageError: there is no such split, folder, transform, keyword or decoder, the extra fast-decode is not installed,
        or what the subclass says.
    """

    name = ""

    def __init__(
        self,
        split: str,
        root: str | os.PathLike = "",
        image_size: int = 224,
        transform: Mapping[str, Any] | None = None,
        skip_damaged: bool = False,
        decoder: str = "pillow",
    ):
        check_split(self.name, split)
        self.split = split
        self.num_examples = self._find(check_root(root))
        if decoder not in _DECODERS:
            raise UsageError(f"config.data.decoder must be one of {', '.join(_DECODERS)}, but is '{decoder}'.")
        if decoder == "fast":
            fast_libraries()  # so that they are missed before the first image
        self._size = image_size
        self._transform = image_transform(transform)
        self._skip_damaged = skip_damaged
        self._fast = decoder == "fast"
        self._damaged: set[int] = set()

    def _find(self, folder: Path) -> int:
        """Finds the images of the split in `folder`; how many there are."""
        raise NotImplementedError

    def _entry(self, index: int) -> tuple[Path | bytes | Image.Image, int, str]:
        """An image (its file, the bytes of its file, or the image itself), its label, and its name in messages."""
        raise NotImplementedError

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        """Image and label number `index`, augmented by `seed`, or cropped for evaluation if that is None.

        Raises:
          UsageError: the image can't be read and damaged ones are not skipped, or none can be read.
        """
        for _ in range(self.num_examples):
            file, label, where = self._entry(index)
            try:
                return {"image": self._pixels(file, seed), "label": np.array(label, np.int32)}
            except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some damaged .png
                if not self._skip_damaged:
                    raise UsageError(
                        f"{where} can't be read as an image ({error}): replace or remove it, or set "
                        "config.data.skip_damaged."
                    ) from error
                if index not in self._damaged:
                    self._damaged.add(index)
                    logging.warning(
                        "%s can't be read; the next image takes its place (%d damaged so far).",
                        where,
                        len(self._damaged),
                    )
            index = (index + 1) % self.num_examples
        raise UsageError(f"none of the {self.num_examples} images of {self.name} ({self.split}) can be read.")

    def _pixels(self, file: Path | bytes | Image.Image, seed: int | None) -> UInt8[np.ndarray, "S S 3"]:
        if seed is None:
            with _open(file) as image:
                return self._transform.evaluate(image, self._size)
        rng = np.random.default_rng(seed)

        def draw(width: int, height: int) -> tuple[Box, bool]:
            return draw_crop(width, height, rng, self._transform.scale), rng.random() < 0.5

        if self._fast and isinstance(file, Path):
            file = file.read_bytes()
        if self._fast and isinstance(file, bytes):
            pixels = fast_crop(file, draw, self._size)
            if not self._transform.num_layers:
                return pixels
            part = Image.fromarray(pixels)
        else:
            with _open(file) as image:
                box, mirrored = draw(*image.size)
                part = mirror(image.crop(box).convert("RGB"), mirrored)
        return np.asarray(self._transform.train(part, self._size, rng))

    @staticmethod
    def shapes(image_size: int = 224, **_: object) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one example, told without opening the data."""
        return image_shapes(image_size, image_size, 3)


def _open(file: Path | bytes | Image.Image) -> Image.Image:
    if isinstance(file, Image.Image):
        return file
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
