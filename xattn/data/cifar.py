"""CIFAR-10 and CIFAR-100 as they are published (Krizhevsky, Learning Multiple Layers of Features from Tiny Images).

    root/cifar-10-batches-bin/    data_batch_1.bin .. data_batch_5.bin, test_batch.bin, batches.meta.txt
    root/cifar-100-binary/        train.bin, test.bin, fine_label_names.txt

are what the archives of the "binary version" hold; root may also be this folder itself. A record is the label (of
CIFAR-100 the coarse and the fine one, of which we take the fine) and 3072 bytes, uint8 [3, 32, 32]. The text files name
the classes, a line each.

There is no third part: train is all 50,000 training images, val and test both are the 10,000 test images.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from xattn.config import UsageError
from xattn.data.checks import read_text
from xattn.data.labelled_images import LabelledImages

_PIXELS = 3 * 32 * 32


class _Cifar(LabelledImages):
    """Images of 32 x 32 pixels with a label, scaled and augmented by the transform.

    Args:
      split: "train", or "val" and "test", which are the same.
      root: the folder of the unpacked archive, or the one that it lies in.
      image_size, transform, skip_damaged, decoder: see `LabelledImages`.

    Attributes:
      class_names: in the order of the labels; labels: int [n].

    Raises:
      UsageError: a file is missing or its size is wrong, or a label has no name.
    """

    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    names_file: str
    label_bytes: int  # of which the last is the label

    def _find(self, folder: Path) -> int:
        folder = folder / self.folder if (folder / self.folder).is_dir() else folder
        paths = [folder / name for name in (self.train_files if self.split == "train" else self.test_files)]
        missing = [path for path in [*paths, folder / self.names_file] if not path.is_file()]
        if missing:
            raise UsageError(
                f"there is no file '{missing[0]}': give the folder that holds {self.folder}, which the archive of the "
                "binary version unpacks to, as config.data.root."
            )
        self.class_names = read_text(folder / self.names_file).split()
        records = [self._records(path) for path in paths]
        self._images = np.concatenate([part[:, self.label_bytes :] for part in records]).reshape(-1, 3, 32, 32)
        self.labels = np.concatenate([part[:, self.label_bytes - 1] for part in records])
        return len(self.labels)

    def _records(self, path: Path) -> np.ndarray:
        data = np.fromfile(path, np.uint8)
        length = self.label_bytes + _PIXELS
        if not len(data) or len(data) % length:
            raise UsageError(
                f"'{path}' has {len(data)} bytes, which is no multiple of the {length} that an image has: unpack or "
                "download the archive again."
            )
        records = data.reshape(-1, length)
        if (largest := records[:, self.label_bytes - 1].max()) >= len(self.class_names):
            raise UsageError(
                f"'{path}' has the label {largest}, but {self.names_file} names {len(self.class_names)} classes: "
                "unpack or download the archive again."
            )
        return records

    def _entry(self, index: int) -> tuple[Image.Image, int, str]:
        image = Image.fromarray(np.ascontiguousarray(self._images[index].transpose(1, 2, 0)))
        return image, int(self.labels[index]), f"image {index} of {self.name} ({self.split})"


class Cifar10(_Cifar):
    """CIFAR-10: 32 x 32 pixels, ten classes: image uint8 [S, S, 3] and label int32."""

    name = "cifar10"
    folder = "cifar-10-batches-bin"
    train_files = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
    test_files = ("test_batch.bin",)
    names_file = "batches.meta.txt"
    label_bytes = 1


class Cifar100(_Cifar):
    """CIFAR-100: 32 x 32 pixels, a hundred classes: image uint8 [S, S, 3] and label int32."""

    name = "cifar100"
    folder = "cifar-100-binary"
    train_files = ("train.bin",)
    test_files = ("test.bin",)
    names_file = "fine_label_names.txt"
    label_bytes = 2
