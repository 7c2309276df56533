"""ImageNet, or any labelled images in class folders, in files or packed into ArrayRecord.

    root/train/<class>/*.JPEG     root/val/<class>/*.JPEG  (or root/validation/...)     root/test/<class>/*.JPEG

Images may be .jpeg, .jpg or .png, in capitals too. Labels number the classes of train by their sorted names. ImageNet's
labels of the test images were never published: where there is no folder test with classes, the split test is val. How
images are cropped and augmented is told by the keyword `transform`; see `xattn.data.transforms`.

Millions of small files are slow to open on network file systems: `xattn data prepare images` packs them into a few
ArrayRecord files, which `xattn.data.prepare` describes.

Deviations: Perceiver IO validates on the first 10,000 images of train (its split VALID); our val is the published one.
"""

import os
import struct
from pathlib import Path
from typing import Any

import grain

from xattn.config import UsageError
from xattn.data.checks import read_text, subfolders
from xattn.data.labelled_images import LabelledImages

_EXTENSIONS = (".jpeg", ".jpg", ".png")
_COMMAND = "`xattn data prepare images SRC OUT`"
_NAMES = {"train": ("train",), "val": ("val", "validation"), "test": ("test", "val", "validation")}


class Imagenet(LabelledImages):
    """Labelled images in class folders: image uint8 [S, S, 3] and label int32.

    Args:
      split: "train", "val" or "test".
      root: the folder that holds train/ and val/.
      image_size, transform, skip_damaged, decoder: see `LabelledImages`.

    Attributes:
      class_names: sorted; files and labels: of each image.

    Raises:
      UsageError: a folder is missing or has no images, or the split has classes that train doesn't have.
    """

    name = "imagenet"

    def _find(self, folder: Path) -> int:
        self.class_names, self.files, self.labels = class_folders(folder, self.split)
        return len(self.files)

    def _entry(self, index: int) -> tuple[Path, int, str]:
        return self.files[index], self.labels[index], f"'{self.files[index]}'"


class ImagenetArrayRecord(LabelledImages):
    """Labelled images in ArrayRecord files: image uint8 [S, S, 3] and label int32.

    Args:
      split: "train", "val" or "test".
      root: the OUT of `xattn data prepare images`.
      image_size, transform, skip_damaged, decoder: see `LabelledImages`.

    Attributes:
      class_names: in the order of their labels.

    Raises:
      UsageError: the folder or its files are missing or damaged, or the package array_record is not installed.
    """

    name = "imagenet_arrayrecord"

    def _find(self, folder: Path) -> int:
        split = self.split
        found = [sorted(folder.glob(f"{name}-*-of-*.arrayrecord")) for name in _NAMES[split]]
        paths = next((files for files in found if files), [])
        if not paths:
            raise UsageError(f"'{folder}' has no files {split}-*-of-*.arrayrecord: write them with {_COMMAND}.")
        expected = int(paths[0].stem.rpartition("-")[2])
        if len(paths) != expected:
            raise UsageError(
                f"'{folder}' has {len(paths)} of the {expected} files {split}-*: copy the others too, or give the "
                f"command that was interrupted, {_COMMAND}, again."
            )
        if not (folder / "classes.txt").is_file():
            raise UsageError(
                f"'{folder}' has no classes.txt: copy it too, or give the command that was interrupted, {_COMMAND}, "
                "again."
            )
        array_record()
        self._records = _open_records(paths)
        self.class_names = read_text(folder / "classes.txt").splitlines()
        return len(self._records)

    def _entry(self, index: int) -> tuple[bytes, int, str]:
        try:
            record = self._records[index]
        except RuntimeError as error:
            raise UsageError(
                f"record {index} of {self.split} can't be read ({error}): copy the .arrayrecord files again, or write "
                f"them again with {_COMMAND}."
            ) from error
        (label,) = struct.unpack("<i", record[:4])
        return record[4:], label, f"record {index} of {self.split}"


def _open_records(paths: list[Path]) -> Any:
    try:
        return grain.sources.ArrayRecordDataSource([str(path) for path in paths])
    except RuntimeError as error:
        if len(paths) == 1:
            raise UsageError(
                f"'{paths[0]}' is damaged or cut short ({error}): copy it again, or delete it and give "
                f"the command that wrote it, {_COMMAND}, again."
            ) from error
        for path in paths:  # the error does not name the file
            _open_records([path])
        raise


def array_record() -> Any:
    """The module that reads and writes ArrayRecord files; `UsageError` if it is not installed."""
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise UsageError("ArrayRecord files need the package array_record: pip install array_record.") from error
    return array_record_module


def class_folders(root: Path, split: str) -> tuple[list[str], list[Path], list[int]]:
    """Class names, and file and label of every image of a split."""
    folder = split_folder(root, split)
    if folder is None:
        raise UsageError(
            f"'{root}' has no split '{split}': expected {root}/{_NAMES[split][0]}/<class>/*.JPEG (or .jpg, .png)."
        )
    own = subfolders(folder)
    names = subfolders(split_folder(root, "train") or folder)
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


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split; None where there is none with classes in it."""
    folders = [root / name for name in _NAMES[split] if (root / name).is_dir()]
    return next((folder for folder in folders if subfolders(folder)), None)
