"""ImageNet, or any labelled images in class folders, as Perceiver IO trains and evaluates on it (arXiv 2107.14795).

    root/train/<class>/*.JPEG     root/val/<class>/*.JPEG  (or root/validation/...)     root/test/<class>/*.JPEG

Images may be .jpeg, .jpg or .png, in capitals too. Labels number the classes of train by their sorted names. ImageNet's
labels of the test images were never published: where there is no folder test with classes, the split test is val.

Training: a random part (8 to 100% of the area), mirrored half of the time, RandAugment, then scaled (bicubic).
Evaluation: the central square of 224/256 of the shorter side, scaled (bicubic); see `xattn.data.transforms`.

Millions of small files are slow to open on network file systems. `write_image_records` packs them into ArrayRecord
files, root/train-00003-of-00016.arrayrecord and so on, with the class names in root/classes.txt, a line each. A record
is the label as little-endian int32, followed by the bytes of the image file as it was.

Deviations: DeepMind's code scales without a low-pass filter and in float32, where values go beyond 0..255; Pillow
filters when it makes an image smaller and gives uint8. Its split VALID is the first 10,000 images of train.
"""

import contextlib
import io
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from PIL import Image

from xattn.config import UsageError, check_keys
from xattn.data.checks import check_root, check_split, subfolders
from xattn.data.episodes import SPLITS
from xattn.data.randaugment import RandAugment
from xattn.data.transforms import eval_crop, image_shapes, random_resized_crop

_EXTENSIONS = (".jpeg", ".jpg", ".png")
_NAMES = {"train": ("train",), "val": ("val", "validation"), "test": ("test", "val", "validation")}


class _LabelledImages:
    """What the two sources share: they only differ in where the bytes of an image and its label come from."""

    name = ""
    split: str
    num_examples: int

    def __init__(
        self, split: str, image_size: int, randaugment: Mapping[str, Any] | None, skip_damaged: bool, num_examples: int
    ):
        check_keys(randaugment or {}, RandAugment, "config.data.randaugment")
        self.split = split
        self.num_examples = num_examples
        self._size = image_size
        self._augment = RandAugment(**(randaugment or {"num_layers": 0}))
        self._skip_damaged = skip_damaged
        self._damaged: set[int] = set()

    def _entry(self, index: int) -> tuple[Any, int, str]:
        """The file of an image, its label, and how to call it in a message."""
        raise NotImplementedError

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        """Image and label number `index`, augmented by `seed`, or cropped for evaluation if that is None.

        Raises:
          UsageError: the image can't be read and damaged ones are not skipped, or none can be read.
        """
        for _ in range(self.num_examples):
            file, label, where = self._entry(index)
            try:
                with Image.open(file) as image:
                    return {"image": self._pixels(image, seed), "label": np.array(label, np.int32)}
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

    def _pixels(self, image: Image.Image, seed: int | None) -> np.ndarray:
        if seed is None:
            return eval_crop(image, self._size)
        rng = np.random.default_rng(seed)
        return random_resized_crop(image, self._size, rng, Image.Resampling.BICUBIC, self._augment)

    @staticmethod
    def shapes(image_size: int = 224, **_: object) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one example, told without opening the data."""
        return image_shapes(image_size, image_size, 3)


class Imagenet(_LabelledImages):
    """Labelled images in class folders: image uint8 [S, S, 3] and label int32.

    Args:
      split: "train", "val" or "test".
      root: the folder that holds train/ and val/.
      image_size: S.
      randaugment: keywords of `xattn.data.randaugment.RandAugment`, num_layers and magnitude; None for none.
      skip_damaged: let the next image take the place of one that can't be read, with a warning that counts them.

    Attributes:
      class_names: sorted; files and labels: of each image.

    Raises:
      UsageError: a folder is missing or has no images, or the split has classes that train doesn't have.
    """

    name = "imagenet"

    def __init__(
        self,
        split: str,
        root: str | os.PathLike = "",
        image_size: int = 224,
        randaugment: Mapping[str, Any] | None = None,
        skip_damaged: bool = False,
    ):
        check_split(self.name, split)
        folder = check_root(root)
        self.class_names, self.files, self.labels = _class_folders(folder, split)
        super().__init__(split, image_size, randaugment, skip_damaged, len(self.files))

    def _entry(self, index: int) -> tuple[Any, int, str]:
        return self.files[index], self.labels[index], f"'{self.files[index]}'"


class ImagenetArrayRecord(_LabelledImages):
    """Labelled images in ArrayRecord files: image uint8 [S, S, 3] and label int32.

    Args:
      split: "train", "val" or "test".
      root: the folder that `write_image_records` wrote.
      image_size, randaugment, skip_damaged: see `Imagenet`.

    Attributes:
      class_names: in the order of their labels.

    Raises:
      UsageError: the folder or its files are missing or damaged, or the package array_record is not installed.
    """

    name = "imagenet_arrayrecord"

    def __init__(
        self,
        split: str,
        root: str | os.PathLike = "",
        image_size: int = 224,
        randaugment: Mapping[str, Any] | None = None,
        skip_damaged: bool = False,
    ):
        check_split(self.name, split)
        folder = check_root(root)
        found = [sorted(folder.glob(f"{name}-*-of-*.arrayrecord")) for name in _NAMES[split]]
        paths = next((files for files in found if files), [])
        if not paths:
            raise UsageError(
                f"'{folder}' has no files {split}-*-of-*.arrayrecord: write them with "
                "xattn.data.imagenet.write_image_records."
            )
        expected = int(paths[0].stem.rpartition("-")[2])
        if len(paths) != expected:
            raise UsageError(f"'{folder}' has {len(paths)} of the {expected} files {split}-*: copy the others too.")
        if not (folder / "classes.txt").is_file():
            raise UsageError(
                f"'{folder}' has no classes.txt: copy it too, or write the files again with "
                "xattn.data.imagenet.write_image_records."
            )
        _array_record()
        self._records = _open_records(paths)
        self.class_names = (folder / "classes.txt").read_text("utf-8").splitlines()
        super().__init__(split, image_size, randaugment, skip_damaged, len(self._records))

    def _entry(self, index: int) -> tuple[Any, int, str]:
        try:
            record = self._records[index]
        except RuntimeError as error:
            raise UsageError(
                f"record {index} of {self.split} can't be read ({error}): copy the .arrayrecord files again, or write "
                "them again with xattn.data.imagenet.write_image_records."
            ) from error
        (label,) = struct.unpack("<i", record[:4])
        return io.BytesIO(record[4:]), label, f"record {index} of {self.split}"


def write_image_records(root: str | os.PathLike, out: str | os.PathLike, num_shards: int = 16) -> None:
    """Packs class folders into ArrayRecord files, `num_shards` of them for each split, and classes.txt.

    The files are written in a hidden folder in `out` and moved when all are complete, classes.txt last.

    Args:
      root: a folder in the layout that `Imagenet` reads, with train/.
      out: is created if it isn't there.
      num_shards: files of a split; image i goes to file i mod num_shards.

    Raises:
      UsageError: see `Imagenet`; an image file can't be read; or the package array_record is not installed.
    """
    writer_class = _array_record().ArrayRecordWriter
    root, out = check_root(root), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as partial:
        folders = []
        for split in SPLITS:
            folder = _split_folder(root, split)
            if split != "train" and folder in (None, *folders):  # there is none, or test is val
                continue
            folders.append(folder)
            names, files, labels = _class_folders(root, split)
            Path(partial, "classes.txt").write_text("".join(f"{name}\n" for name in names), "utf-8")
            with contextlib.ExitStack() as opened:
                writers = []
                for shard in range(num_shards):
                    path = Path(partial, f"{split}-{shard:05d}-of-{num_shards:05d}.arrayrecord")
                    writers.append(writer_class(str(path), "group_size:1"))
                    opened.callback(writers[-1].close)
                for number, (file, label) in enumerate(zip(files, labels, strict=True)):
                    writers[number % num_shards].write(struct.pack("<i", label) + _read(file))
        for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == "classes.txt"):
            path.replace(out / path.name)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"'{file}' can't be read ({error}): replace or remove it.") from error


def _open_records(paths: list[Path]) -> Any:
    try:
        return grain.sources.ArrayRecordDataSource([str(path) for path in paths])
    except RuntimeError as error:
        if len(paths) == 1:
            raise UsageError(
                f"'{paths[0]}' is damaged or cut short ({error}): copy it again, or write it again with "
                "xattn.data.imagenet.write_image_records."
            ) from error
        for path in paths:  # the error does not name the file
            _open_records([path])
        raise


def _array_record() -> Any:
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise UsageError("ArrayRecord files need the package array_record: pip install array_record.") from error
    return array_record_module


def _class_folders(root: Path, split: str) -> tuple[list[str], list[Path], list[int]]:
    """Class names, and file and label of every image of a split."""
    folder = _split_folder(root, split)
    if folder is None:
        raise UsageError(
            f"'{root}' has no split '{split}': expected {root}/{_NAMES[split][0]}/<class>/*.JPEG (or .jpg, .png)."
        )
    own = subfolders(folder)
    names = subfolders(_split_folder(root, "train") or folder)
    if unknown := set(own) - set(names):
        raise UsageError(
            f"'{folder}' has {len(unknown)} classes that '{root / 'train'}' doesn't have, such as '{min(unknown)}': "
            "both need the same class folders."
        )
    files, labels = [], []
    for name in own:
        with os.scandir(folder / name) as entries:
            members = sorted(
                entry.name for entry in entries if entry.name.lower().endswith(_EXTENSIONS) and entry.name[0] != "."
            )
        files += [folder / name / member for member in members]
        labels += [names.index(name)] * len(members)
    if not files:
        raise UsageError(f"'{folder}' has no images: expected {folder}/<class>/*.JPEG (or .jpg, .png).")
    return names, files, labels


def _split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split; None where there is none with classes in it."""
    folders = [root / name for name in _NAMES[split] if (root / name).is_dir()]
    return next((folder for folder in folders if subfolders(folder)), None)
