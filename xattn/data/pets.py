"""The Oxford-IIIT Pet data set (Parkhi et al., Cats and Dogs, CVPR 2012) as it is published: 37 breeds.

    root/images/Abyssinian_100.jpg
    root/annotations/trainval.txt, test.txt         lines "Abyssinian_100 1 1 1": name, class from 1 on, species, breed

There is no third part: train is trainval.txt (3,680 images), val and test both are test.txt (3,669).
"""

from pathlib import Path

from xattn.config import UsageError
from xattn.data.checks import read_text
from xattn.data.labelled_images import LabelledImages


class Pets(LabelledImages):
    """Photographs of cats and dogs with their breed: image uint8 [S, S, 3] and label int32, the class less 1.

    Args:
      split: "train", or "val" and "test", which are the same.
      root: the folder that holds images/ and annotations/.
      image_size, transform, skip_damaged, decoder: see `LabelledImages`.

    Attributes:
      class_names: in the order of the labels; files and labels: of each image.

    Raises:
      UsageError: a file is missing, a line is not of this form, or a class is not one of trainval.txt.
    """

    name = "pets"

    def _find(self, folder: Path) -> int:
        train = _rows(folder / "annotations" / "trainval.txt")
        names = {number: image.rpartition("_")[0] for image, number in train}
        self.class_names = [names.get(number, "") for number in range(1, max(names) + 1)]
        listed = folder / "annotations" / ("trainval.txt" if self.split == "train" else "test.txt")
        rows = _rows(listed)
        for image, number in rows:
            if names.get(number) != image.rpartition("_")[0]:
                raise UsageError(
                    f"'{listed}' has '{image}' in class {number}, which trainval.txt calls '{names.get(number, '')}': "
                    "unpack the archive annotations.tar.gz again."
                )
        self.files = [folder / "images" / f"{image}.jpg" for image, _ in rows]
        self.labels = [number - 1 for _, number in rows]
        if missing := [file for file in self.files if not file.is_file()]:
            raise UsageError(
                f"'{listed}' lists {len(missing)} of {len(rows)} images that are not there, such as '{missing[0]}': "
                "unpack the archive images.tar.gz again."
            )
        return len(rows)

    def _entry(self, index: int) -> tuple[Path, int, str]:
        return self.files[index], self.labels[index], f"'{self.files[index]}'"


def _rows(path: Path) -> list[tuple[str, int]]:
    """Name and class number of the images in a list."""
    if not path.is_file():
        raise UsageError(
            f"there is no file '{path}': give the folder that holds images/ and annotations/ as config.data.root."
        )
    rows = []
    for place, line in enumerate(read_text(path).splitlines(), start=1):
        match line.split():
            case [image, number, _, _] if number.isdigit() and int(number) > 0:
                rows.append((image, int(number)))
            case [first, *_] if not first.startswith("#"):
                raise UsageError(
                    f"line {place} of '{path}' is '{line}', but needs a name and three numbers: class, species, breed."
                )
    if not rows:
        raise UsageError(f"'{path}' lists no images: unpack the archive annotations.tar.gz again.")
    return rows
