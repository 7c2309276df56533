"""Class folders packed into a few large files, since millions of small ones are slow on network file systems.

    xattn data prepare images SRC OUT --shards=16

SRC is in the layout of `xattn.data.imagenet`. OUT is read by the source `imagenet_arrayrecord`, and gets

    train-00003-of-00016.arrayrecord, ...   a record an image: its label as little-endian int32, then its file's bytes
    manifest.json                           the class names; of each file the count and the SHA-256 of its records
    classes.txt                             the class names, a line each

Image i of a split goes to file i mod n, so that every file shows all classes. A file is written under a hidden name and
renamed when it is complete: the same command, given again, keeps it and writes those that are missing. At the end
every record is read back and compared with what was written; classes.txt comes last.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from xattn.config import UsageError, write_atomically
from xattn.data.checks import check_root
from xattn.data.episodes import SPLITS
from xattn.data.imagenet import array_record, class_folders, split_folder

_FORMAT = "xattn images 1"
_Examples = list[tuple[Path, int]]  # files and labels


def write_image_records(
    source: str | os.PathLike, out: str | os.PathLike, num_shards: int = 16, num_threads: int = 8
) -> str:
    """Packs class folders into ArrayRecord files, or completes and checks what an earlier call began.

    Args:
      source: a folder in the layout that `xattn.data.imagenet.Imagenet` reads, with train/.
      out: is created if it isn't there.
      num_shards: files of a split; fewer where a split has fewer images.
      num_threads: threads that read ahead.

    Returns:
      A sentence that says what is there now.

    Raises:
      UsageError: see `Imagenet`; an image file can't be read; `out` holds something else, or was begun with other
        images or another `num_shards`; what is read back is not what was written; or the package array_record is not
        installed.
    """
    array_record()
    root, out = check_root(source), Path(out)
    classes, splits = _splits(root)
    planned = {
        "format": _FORMAT,
        "num_shards": num_shards,
        "images": {split: len(examples) for split, examples in splits.items()},
        "source_sha256": _fingerprint(root, splits),
        "classes": classes,
        "shards": {},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
            return _complete(out, planned, splits, num_threads)
        finally:
            os.close(folder)
    except BlockingIOError as error:
        raise UsageError(f"another `xattn data prepare images` is writing '{out}': let it finish.") from error
    except OSError as error:
        raise UsageError(f"'{out}' can't be written ({error}): make room, or give another folder.") from error


def _complete(out: Path, planned: dict[str, Any], splits: dict[str, _Examples], num_threads: int) -> str:
    manifest = _begin(out, planned)
    shards = _shards(splits, planned["num_shards"])
    missing = [name for name in shards if name not in manifest["shards"] or not (out / name).is_file()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:

        def counted(records: Iterable[bytes], task: TaskID) -> Iterator[bytes]:
            for record in records:
                yield record
                progress.advance(task)

        task = progress.add_task("write", total=sum(len(shards[name]) for name in missing), visible=bool(missing))
        for name in missing:
            manifest["shards"][name] = _write(out / name, counted(_files(shards[name], num_threads), task))
            write_atomically(out / "manifest.json", json.dumps(manifest, indent=1))
            progress.console.print(f"{name}: {len(shards[name])} images", highlight=False, soft_wrap=True)
        task = progress.add_task("check", total=sum(map(len, shards.values())))
        for name in shards:
            _check(out / name, manifest["shards"][name], counted(_records(out / name, num_threads), task))
    write_atomically(out / "classes.txt", "".join(f"{name}\n" for name in planned["classes"]))
    counts = " and ".join(f"{len(examples)} images of {split}" for split, examples in splits.items())
    before = f"{len(missing)} of them missing before, " if missing else "all there before, "
    before = before if len(missing) < len(shards) else ""
    return f"{out} has {counts} in {len(shards)} files, {before}every record read back and found right."


PREPARATIONS = {"images": write_image_records}
"""What `xattn data prepare` takes: its name, and the function of a source, a folder for the result and two counts."""


def _splits(root: Path) -> tuple[list[str], dict[str, _Examples]]:
    """The class names, and the examples of every split that has a folder of its own."""
    folders = {split: split_folder(root, split) for split in SPLITS}
    folders = {split: folder for split, folder in folders.items() if split != "test" or folder != folders["val"]}
    splits = {split: class_folders(root, split) for split, folder in folders.items() if folder or split == "train"}
    classes, _, _ = splits["train"]
    return classes, {split: list(zip(files, labels, strict=True)) for split, (_, files, labels) in splits.items()}


def _fingerprint(root: Path, splits: dict[str, _Examples]) -> str:
    """A SHA-256 that changes with the names, labels and sizes of the files."""
    digest = hashlib.sha256()
    for examples in splits.values():
        for file, label in examples:
            with _unreadable_named(file):
                digest.update(f"{file.relative_to(root).as_posix()}\0{label}\0{file.stat().st_size}\n".encode())
    return digest.hexdigest()


def _shards(splits: dict[str, _Examples], num_shards: int) -> dict[str, _Examples]:
    shards = {}
    for split, examples in splits.items():
        count = min(num_shards, len(examples))
        for shard in range(count):
            shards[f"{split}-{shard:05d}-of-{count:05d}.arrayrecord"] = examples[shard::count]
    return shards


def _begin(out: Path, planned: dict[str, Any]) -> dict[str, Any]:
    """The manifest in `out`, which is `planned` but for its finished shards; written there if the folder is empty."""
    path = out / "manifest.json"
    if not path.is_file():
        if any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UsageError(
                f"'{out}' holds files that `xattn data prepare images` did not write: give an empty folder."
            )
        write_atomically(path, json.dumps(planned, indent=1))
        return planned
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError:
        manifest = {}
    if not isinstance(manifest, dict) or manifest.get("format") != planned["format"]:
        raise UsageError(f"'{path}' is none of `xattn data prepare images`: give an empty folder.")
    if manifest["num_shards"] != planned["num_shards"]:
        raise UsageError(
            f"'{out}' was begun with --shards={manifest['num_shards']}, but now it is {planned['num_shards']}: give "
            "the same number, or an empty folder."
        )
    if any(manifest[key] != planned[key] for key in ("classes", "source_sha256")):
        before, now = (sum(plan["images"].values()) for plan in (manifest, planned))
        raise UsageError(
            f"the images have changed since '{out}' was begun ({before} then, {now} now, or other names, sizes or "
            "classes): put them back, or give an empty folder."
        )
    return manifest


def _write(path: Path, records: Iterable[bytes]) -> dict[str, Any]:
    """Writes a file of records, which has its name when it is complete; returns what its records are like."""
    partial = path.with_name(f".{path.name}")

    def written(writer: Any) -> Iterator[bytes]:
        for record in records:
            writer.write(record)
            yield record

    try:
        options = "group_size:1,uncompressed"  # images are compressed
        with contextlib.closing(array_record().ArrayRecordWriter(str(partial), options)) as writer:
            tally = _tally(written(writer))
    except RuntimeError as error:
        raise UsageError(f"'{path}' can't be written ({error}): make room, or choose another folder.") from error
    partial.replace(path)
    return tally


def _check(path: Path, expected: dict[str, Any], records: Iterable[bytes]) -> None:
    try:
        found = _tally(records)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"'{path}' is damaged ({error}): delete it and give the command again.") from error
    if found != expected:
        raise UsageError(
            f"'{path}' holds {found['count']} records that are not the {expected['count']} that were written: delete "
            "it and give the command again."
        )


def _tally(records: Iterable[bytes]) -> dict[str, Any]:
    digest, count = hashlib.sha256(), 0
    for record in records:
        digest.update(record)
        count += 1
    return {"count": count, "sha256": digest.hexdigest()}


def _files(examples: _Examples, num_threads: int) -> Iterator[bytes]:
    """The records of examples, in their order; threads read files ahead."""

    def record(example: tuple[Path, int]) -> bytes:
        file, label = example
        with _unreadable_named(file):
            return struct.pack("<i", label) + file.read_bytes()

    return _ahead(examples, num_threads, record)


def _records(path: Path, num_threads: int) -> Iterator[bytes]:
    """The records of a file that was written, in their order."""
    yield from _ahead(grain.sources.ArrayRecordDataSource([str(path)]), num_threads, bytes)


def _ahead(source: Any, num_threads: int, function: Callable[[Any], bytes]) -> Iterator[bytes]:
    """The function's values for the members of a sequence, computed by threads and given out in order."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    return iter(grain.MapDataset.source(source).map(function).to_iter_dataset(options))


@contextlib.contextmanager
def _unreadable_named(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"'{file}' can't be read ({error}): replace or remove it.") from error
