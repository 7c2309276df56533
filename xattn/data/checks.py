"""What sources check of the keywords they are given, each with one sentence wherever it is wrong."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn.config import UsageError
from xattn.data.episodes import SPLITS


def check_split(name: str, split: str, splits: Sequence[str] = SPLITS) -> None:
    """Raises `UsageError` if the source `name` has no such split."""
    if split not in splits:
        raise UsageError(f"{name} has no split '{split}': choose one of {', '.join(splits)}.")


def check_root(root: str | os.PathLike) -> Path:
    """The folder of a data set; raises `UsageError` if it is not given or not there."""
    if not str(root):
        raise UsageError("the folder of the data set is not given: add --config.data.root=DIR.")
    if not Path(root).is_dir():
        raise UsageError(f"There is no folder '{root}': give the folder that holds the data set as root.")
    return Path(root)


def check_image_size(name: str, image_size: Any) -> tuple[int, int]:
    """The height and width that the source `name` is given; raises `UsageError` if they are not two sizes."""
    match image_size:
        case (int(height), int(width)) if min(height, width) > 0:
            return height, width
    raise UsageError(
        f"{name} needs the height and the width of images as image_size, but got {image_size}: "
        "give two whole numbers of at least 1, such as (64, 96)."
    )


def read_text(path: Path) -> str:
    """The contents of a list that comes with a data set; raises `UsageError` if it can't be read or is no text."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' can't be read as text ({error}): get it again, or mend it.") from error


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones; raises `UsageError` if it can't be read."""
    try:
        return sorted(name for name in os.listdir(folder) if name[0] != "." and os.path.isdir(folder / name))
    except OSError as error:
        raise UsageError(f"'{folder}' can't be read ({error}): mend it, or change its permissions.") from error
