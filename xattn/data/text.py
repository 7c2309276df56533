"""Text as windows of bytes: the sources of Python's standard library, and text files of your own.

Every document is cut into windows of `length` bytes. No window holds parts of two documents, and the last window of
a document is filled up with PAD. In training a window begins at a random place up to `length - 1` bytes later than
in evaluation (but so that it ends before its document does), so an epoch shows each document with other borders.

The text of a split must fit into memory, where it is held once.
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
from xattn.data.checks import check_root, check_split
from xattn.data.episodes import SPLITS

_NO_SOURCES = ("site-packages", "test", "tests", "idle_test")


class ByteWindows:
    """Windows of documents: tokens int32 [length], byte b is b + 6 (see `xattn.data.byte_tokenizer`).

    Args:
      split: "train", "val" or "test".
      documents: bytes of each, kept as they are; empty ones have no windows.
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
        self._documents = documents
        windows = -(-np.array([len(document) for document in documents], np.int64) // length)
        self._first = np.cumsum(windows) - windows  # number of each document's first window
        self.num_examples = int(windows.sum())
        if not self.num_examples:
            raise UsageError(f"{self.name} has no text in the split '{split}': all of its documents are empty.")

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        """Window number `index`, moved by up to `length - 1` bytes if there is a seed."""
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        document, start = self._documents[number], (index - int(self._first[number])) * self.length
        if seed is not None:
            start += int(np.random.default_rng(seed).integers(self.length))
            start = max(min(start, len(document) - self.length), 0)
        return {"tokens": encode(document[start : start + self.length], self.length)}

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
        check_split(self.name, split)
        files = {name: path for name, path in _library() if _part_of(name.partition(".")[0].encode()) == split}
        self.modules = list(files)
        super().__init__(split, [path.read_bytes() for path in files.values()], length)


class TextFiles(ByteWindows):
    """Text from a folder: .txt files, each a document, and .jsonl files, each line a document in its field `text`.

    With folders `root/train`, `root/val` and `root/test` these are the splits. Otherwise all documents below `root`
    are divided: `crc32(document) mod 20` is 1 for val, 3 for test, and anything else for train. Text is UTF-8, and that
    of a split must fit into memory. Lines end at the newline character alone; blank ones are skipped.

    Args:
      split: "train", "val" or "test".
      root: the folder.
      length: M, bytes of a window.

    Raises:
      UsageError: the folder is missing, the split has no text, a file is not UTF-8, or a line is not JSON with a field
        `text`.
    """

    name = "text_files"

    def __init__(self, split: str, root: str | os.PathLike = "", length: int = 2048):
        check_split(self.name, split)
        root = check_root(root)
        divided = any((root / name).is_dir() for name in SPLITS)
        folder = root / split if divided else root
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl"))
        documents = [text for path in files for text in _documents(path) if divided or _part_of(text) == split]
        if not any(documents):
            raise UsageError(
                f"'{folder}' has no text for the split '{split}' in {len(files)} .txt and .jsonl files: "
                f"put some into {root / split}."
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


def _documents(path: Path) -> Iterator[bytes]:
    if path.suffix == ".txt":
        document = path.read_bytes()
        try:
            document.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"'{path}' is not text in UTF-8 ({error}): convert or remove it.") from error
        yield document
        return
    with path.open("rb") as lines:  # lines of bytes end at b"\n" alone, those of str at U+2028 and others too
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                document = json.loads(line)["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(
                    f"line {number} of '{path}' is not a JSON object in UTF-8 with a string 'text': "
                    "correct or remove it."
                ) from error
            yield document


def _part_of(data: bytes) -> str:
    part = zlib.crc32(data) % 20
    return {1: "val", 3: "test"}.get(part, "train")
