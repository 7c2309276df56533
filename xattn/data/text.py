"""Text as windows of bytes: the sources of Python's standard library, and text files of your own.

Every document is cut into windows of `length` bytes. No window holds parts of two documents, and the last window of
a document is filled up with PAD. In training a window begins at a random place up to `length - 1` bytes later than
in evaluation (but so that it ends before its document does), so an epoch shows each document with other borders.
"""

import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from xattn.config import UsageError
from xattn.data.byte_tokenizer import encode
from xattn.data.episodes import SPLITS

_NO_SOURCES = ("site-packages", "test", "tests", "idle_test")


class ByteWindows:
    """Windows of documents: tokens int32 [length], byte b is b + 6 (see `xattn.data.byte_tokenizer`).

    Args:
      split: "train", "val" or "test".
      documents: bytes of each; empty ones are left out.
      length: M, bytes of a window.

    Raises:
      UsageError: the length is below 1, or all documents are empty.
    """

    name = "bytes"

    def __init__(self, split: str, documents: Sequence[bytes], length: int):
        if length < 1:
            raise UsageError(f"{self.name} needs a length of at least 1, but got {length}.")
        self.split = split
        self.length = length
        self._data = b"".join(documents)
        ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        starts = np.concatenate([[0], ends])[:-1]
        windows = -(-(ends - starts) // length)
        self._document_starts, self._document_ends = np.repeat(starts, windows), np.repeat(ends, windows)
        first = np.repeat(np.concatenate([[0], np.cumsum(windows)])[:-1], windows)
        self._starts = self._document_starts + (np.arange(windows.sum()) - first) * length
        self.num_examples = len(self._starts)
        if not self.num_examples:
            raise UsageError(f"{self.name} has no text in the split '{split}': all of its documents are empty.")

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        """Window number `index`, moved by up to `length - 1` bytes if there is a seed."""
        start, end = self._starts[index], self._document_ends[index]
        if seed is not None:
            start += np.random.default_rng(seed).integers(self.length)
            start = max(min(start, end - self.length), self._document_starts[index])
        return {"tokens": encode(self._data[start : min(start + self.length, end)], self.length)}

    @staticmethod
    def shapes(length: int = 2048, **_: object) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one example, told without opening the data."""
        return {"tokens": jax.ShapeDtypeStruct((length,), np.int32)}


class PythonSources(ByteWindows):
    """The source code of Python's own standard library: some 12 MB of text that every installation has.

    Tests are left out. A package lies in one split as a whole: in part `crc32(name) mod 20` of 20, of which part 1 is
    val, part 3 test and the others train. The text changes with the version of Python, so compare results that were
    computed with the same one.

    Args:
      split: "train", "val" or "test".
      length: M, bytes of a window.

    Attributes:
      modules: the names of the files' modules, such as "json.decoder", in the order of the windows.
    """

    name = "python_sources"

    def __init__(self, split: str, length: int = 2048):
        _check_split(self.name, split)
        files = {name: path for name, path in _library() if _part_of(name.partition(".")[0].encode()) == split}
        self.modules = list(files)
        super().__init__(split, [path.read_bytes() for path in files.values()], length)


class TextFiles(ByteWindows):
    """Text from a folder: .txt files, each a document, and .jsonl files, each line a document in its field `text`.

    With folders `root/train`, `root/val` and `root/test` these are the splits. Otherwise all documents below `root`
    are divided: `crc32(document) mod 20` is 1 for val, 3 for test, and anything else for train. The text of a split is
    held in memory.

    Args:
      split: "train", "val" or "test".
      root: the folder.
      length: M, bytes of a window.

    Raises:
      UsageError: the folder is missing, the split has no text, or a line is not JSON with a field `text`.
    """

    name = "text_files"

    def __init__(self, split: str, root: str | os.PathLike = "", length: int = 2048):
        _check_split(self.name, split)
        if not str(root):
            raise UsageError("the folder of the text is not given: add --config.data.root=DIR.")
        if not Path(root).is_dir():
            raise UsageError(f"There is no folder '{root}': give the folder that holds the text as root.")
        divided = any((Path(root) / name).is_dir() for name in SPLITS)
        folder = Path(root) / split if divided else Path(root)
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl"))
        documents = [document for path in files for document in _documents(path)]
        if not divided:
            documents = [document for document in documents if _part_of(document) == split]
        if not any(documents):
            raise UsageError(
                f"'{folder}' has no text for the split '{split}' in {len(files)} .txt and .jsonl files: "
                f"put some into {Path(root) / split}."
            )
        super().__init__(split, documents, length)


def _library() -> Iterator[tuple[str, Path]]:
    """Name and file of every module of the standard library that is no test, in the order of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, files in os.walk(root):
        # config-3.11-x86_64-linux-gnu and _sysconfigdata... differ from machine to machine.
        subfolders[:] = sorted(name for name in subfolders if name not in _NO_SOURCES and "-" not in name)
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = Path(folder, file)
                yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path


def _documents(path: Path) -> list[bytes]:
    if path.suffix == ".txt":
        return [path.read_bytes()]
    documents = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            documents.append(json.loads(line)["text"].encode())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"line {number} of '{path}' is not a JSON object with a string 'text': correct or remove it."
            ) from error
    return documents


def _part_of(data: bytes) -> str:
    part = zlib.crc32(data) % 20
    return {1: "val", 3: "test"}.get(part, "train")


def _check_split(name: str, split: str) -> None:
    if split not in SPLITS:
        raise UsageError(f"{name} has no split '{split}': choose one of {', '.join(SPLITS)}.")
