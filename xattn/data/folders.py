"""Few-shot data sets that lie on disk as image files.

Two layouts are read, and the one that is there is recognised:

    root/<split>/<class>/*.jpg       or root/meta-<split>/...; tieredImageNet, FC100, CIFAR-FS
    root/images/*.jpg                with root/split/<split>.csv, whose first two columns are filename and
                                     label; miniImageNet (Ravi & Larochelle's split), CUB (FEAT's split)

Images may be .jpg, .jpeg or .png. Classes and files are put in the order of their names, so that class and
image numbers do not depend on the file system.
"""

import csv
import io
import os
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from xattn.config import UsageError
from xattn.data.checks import check_root, check_split, read_text, subfolders
from xattn.data.episodes import SPLITS
from xattn.data.transforms import center_crop, image_shapes, random_resized_crop

_EXTENSIONS = (".jpg", ".jpeg", ".png")


class ClassFolders:
    """A split of a data set on disk; images are decoded when they are asked for.

    Args:
      root: the folder of the data set, in one of the layouts above.
      split: "train", "val" or "test".
      image_size: S; images come out as uint8 [S, S, 3].
      augment: use the training transform (random resized crop and mirroring) where seeds are given.

    Attributes:
      class_names: sorted; labels: int32 [n], indices into it; groups: None; files: the path of each image.

    Raises:
      UsageError: the folder, the split or a listed file is missing, or two splits share a class.
    """

    name = "class_folders"
    groups = None

    def __init__(self, root: str | os.PathLike = "", split: str = "train", image_size: int = 84, augment: bool = False):
        check_split(self.name, split)
        root = check_root(root)
        names = _class_names(root, split)
        if not names:
            raise UsageError(
                f"'{root}' has no split '{split}': expected {root}/{split}/<class>/*.jpg (or .jpeg, .png), "
                f"or {root}/images/ with {root}/split/{split}.csv."
            )
        for other in SPLITS:
            if other != split and (shared := names & _class_names(root, other)):
                raise UsageError(
                    f"'{root}' has {len(shared)} classes in both {split} and {other}, such as "
                    f"'{min(shared)}': few-shot splits must not share a class, so remove it from one of them."
                )
        self.split = split
        self.image_shape = (image_size, image_size, 3)
        self.augment = augment
        self.class_names = sorted(names)
        members = _files(root, split)
        self.files = [file for name in self.class_names for file in members[name]]
        self.labels = np.repeat(
            np.arange(len(names), dtype=np.int32), [len(members[name]) for name in self.class_names]
        )
        self.num_images = len(self.files)

    @staticmethod
    def shapes(image_size: int = 84, **_: object) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one image, told without opening the data."""
        return image_shapes(image_size, image_size, 3)

    def images(
        self, indices: Int[np.ndarray, "*A"], seeds: Int[np.ndarray, "*A"] | None = None
    ) -> UInt8[np.ndarray, "*A H W C"]:
        """The images at `indices`: augmented by `seeds` if this source augments, else centre-cropped.

        Raises:
          UsageError: a file is not an image.
        """
        indices = np.asarray(indices)
        out = np.empty((indices.size, *self.image_shape), np.uint8)
        for i, index in enumerate(indices.flat):
            try:
                with Image.open(self.files[index]) as image:
                    if self.augment and seeds is not None:
                        rng = np.random.default_rng(np.asarray(seeds).flat[i])
                        out[i] = random_resized_crop(image, self.image_shape[0], rng)
                    else:
                        out[i] = center_crop(image, self.image_shape[0])
            except OSError as error:
                raise UsageError(
                    f"'{self.files[index]}' can't be read as an image ({error}): replace or remove it."
                ) from error
        return out.reshape(*indices.shape, *self.image_shape)


def _class_names(root: Path, split: str) -> set[str]:
    """The classes of a split; none where it isn't there."""
    if (table := root / "split" / f"{split}.csv").is_file():
        return {label for _, label in _rows(table)}
    return {path.name for path in _class_folders(root, split)}


def _files(root: Path, split: str) -> dict[str, list[Path]]:
    """Class -> its image files, sorted by name."""
    table = root / "split" / f"{split}.csv"
    if not table.is_file():
        return {
            folder.name: sorted(
                path
                for path in folder.iterdir()
                if path.suffix.lower() in _EXTENSIONS and not path.name.startswith(".")
            )
            for folder in _class_folders(root, split)
        }
    members = {}
    for file, label in _rows(table):
        members.setdefault(label, []).append(root / "images" / file)
    missing = [file for files in members.values() for file in files if not file.is_file()]
    if missing:
        raise UsageError(
            f"'{table}' lists {len(missing)} files that are not there, such as '{missing[0]}': "
            f"put the images into {root / 'images'}."
        )
    return {label: sorted(files) for label, files in members.items()}


def _class_folders(root: Path, split: str) -> list[Path]:
    for folder in (root / split, root / f"meta-{split}"):
        if folder.is_dir():
            return [folder / name for name in subfolders(folder)]
    return []


def _rows(table: Path) -> list[tuple[str, str]]:
    """The (filename, label) rows of a split file; further columns are attributes that nobody reads."""
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(read_text(table), newline="")) if row]
    except csv.Error as error:
        raise UsageError(f"'{table}' can't be read as a table ({error}): mend it.") from error
    if not rows or rows[0][:2] != ["filename", "label"]:
        raise UsageError(f"'{table}' must begin with the header 'filename,label', but begins with {rows[:1]}.")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) < 2 or not all(row[:2]):
            raise UsageError(f"Row {number} of '{table}' is {row}, but needs a filename and a label.")
    return [(row[0], row[1]) for row in rows[1:]]
