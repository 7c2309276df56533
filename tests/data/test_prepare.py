"""Packing class folders: what is written, and what happens when it is interrupted, repeated, or finds other things."""

import fcntl
import hashlib
import json
import os
import struct
from pathlib import Path

import grain
import pytest

from xattn.config import UsageError
from xattn.data.imagenet import ImagenetArrayRecord
from xattn.data.prepare import write_image_records

# Files need not be images to be packed.
COUNTS = {"train": {"cat": 5, "dog": 4, "owl": 0}, "val": {"dog": 3}}


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "images"
    for split, classes in COUNTS.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.JPEG").write_bytes(f"{split} {name} {number}".encode() * 20)
    return root


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "records"


def records(path):
    data = grain.sources.ArrayRecordDataSource([str(path)])
    return [data[index] for index in range(len(data))]


def record(root, split, name, number):
    label = list(COUNTS["train"]).index(name)
    return struct.pack("<i", label) + (root / split / name / f"{number}.JPEG").read_bytes()


def state(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_image_i_goes_to_file_i_mod_n_and_the_manifest_tells(source, out):
    said = write_image_records(source, out, num_shards=2)
    assert (
        said == f"{out} has 9 images of train and 3 images of val in 4 files, every record read back and found right."
    )
    train = [
        record(source, "train", name, number) for name in ("cat", "dog") for number in range(COUNTS["train"][name])
    ]
    val = [record(source, "val", "dog", number) for number in range(3)]
    expected = {
        f"{split}-{shard:05d}-of-00002.arrayrecord": members[shard::2]
        for split, members in (("train", train), ("val", val))
        for shard in range(2)
    }
    assert {path.name for path in out.iterdir()} == {*expected, "manifest.json", "classes.txt"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["classes"] == ["cat", "dog", "owl"] and manifest["images"] == {"train": 9, "val": 3}
    assert (out / "classes.txt").read_text() == "cat\ndog\nowl\n"
    for name, members in expected.items():
        assert records(out / name) == members
        digest = hashlib.sha256(b"".join(members)).hexdigest()
        assert manifest["shards"][name] == {"count": len(members), "sha256": digest}


def test_no_file_is_without_images(source, out):
    write_image_records(source, out, num_shards=5)
    assert len(list(out.glob("train-*-of-00005.arrayrecord"))) == 5
    assert len(list(out.glob("val-*-of-00003.arrayrecord"))) == 3
    assert ImagenetArrayRecord("val", out).num_examples == 3


def test_a_second_run_only_checks(source, out):
    write_image_records(source, out, num_shards=2)
    before = state(out)
    said = write_image_records(source, out, num_shards=2)
    assert "in 4 files, all there before, every record read back and found right." in said
    after = state(out)
    assert {name: after[name] for name in before if name != "classes.txt"} == {
        name: entry for name, entry in before.items() if name != "classes.txt"
    }


def test_an_interrupted_run_continues_with_the_files_that_are_missing(source, out, monkeypatch):
    read = Path.read_bytes

    def interrupted(path):
        if path.match("train/dog/2.JPEG"):  # image 7: the middle of the second of three files
            raise OSError("the disk is gone")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", interrupted)
    with pytest.raises(UsageError) as error:
        write_image_records(source, out, num_shards=3)
    named = source / "train" / "dog" / "2.JPEG"
    assert str(error.value) == f"'{named}' can't be read (the disk is gone): replace or remove it."
    monkeypatch.undo()
    first = out / "train-00000-of-00003.arrayrecord"
    assert [path for path in out.glob("*.arrayrecord") if path.name[0] != "."] == [first]
    with pytest.raises(UsageError, match="1 of the 3 files train-.*: copy .* or give the command that was"):
        ImagenetArrayRecord("train", out)
    kept = state(out)[first.name]
    said = write_image_records(source, out, num_shards=3)
    assert "in 6 files, 5 of them missing before, every record" in said
    assert state(out)[first.name] == kept
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    write_image_records(source, out.parent / "at_once", num_shards=3)
    for path in (out.parent / "at_once").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_file_that_was_removed_is_written_again(source, out):
    write_image_records(source, out, num_shards=2)
    (out / "val-00001-of-00002.arrayrecord").unlink()
    assert "1 of them missing before" in write_image_records(source, out, num_shards=2)
    assert records(out / "val-00001-of-00002.arrayrecord") == [record(source, "val", "dog", 1)]


def test_damage_is_found_when_records_are_read_back(source, out):
    write_image_records(source, out, num_shards=2)
    shard, other = (out / f"train-0000{number}-of-00002.arrayrecord" for number in (0, 1))
    good = shard.read_bytes()
    damaged = bytearray(good)
    damaged[300] ^= 255
    for data in (bytes(damaged), good[:-1], b""):
        shard.write_bytes(data)
        with pytest.raises(UsageError, match=f"'{shard}' is damaged .*: delete it and give the command again"):
            write_image_records(source, out, num_shards=2)
    shard.write_bytes(other.read_bytes())
    with pytest.raises(UsageError, match=f"'{shard}' holds 4 records that are not the 5 that were written: delete it"):
        write_image_records(source, out, num_shards=2)
    shard.unlink()
    write_image_records(source, out, num_shards=2)
    assert records(shard)[0] == record(source, "train", "cat", 0)


@pytest.mark.parametrize("change", ["new", "gone", "longer", "class"])
def test_images_that_changed_since_are_refused(source, out, change):
    write_image_records(source, out, num_shards=2)
    before = state(out)
    file = source / "train" / "cat" / "2.JPEG"
    if change == "new":
        file.with_name("9.JPEG").write_bytes(b"x")
    elif change == "gone":
        file.unlink()
    elif change == "longer":
        file.write_bytes(b"x")
    else:
        (source / "train" / "zebra").mkdir()
    now = 12 + (change == "new") - (change == "gone")
    with pytest.raises(UsageError, match=rf"the images have changed since '{out}' was begun \(12 then, {now} now, or"):
        write_image_records(source, out, num_shards=2)
    assert state(out) == before


def test_other_mistakes_are_named(source, out, tmp_path):
    with pytest.raises(UsageError, match="There is no folder '.*/none'"):
        write_image_records(tmp_path / "none", out)
    with pytest.raises(UsageError, match=r"has no split 'train': expected .*/train/<class>/\*.JPEG"):
        write_image_records(tmp_path, out)
    assert not out.exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file' can't be written .*give another folder"):
        write_image_records(source, tmp_path / "file")
    out.mkdir(parents=True)
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another `xattn data prepare images` is writing"):
        write_image_records(source, out)
    os.close(folder)
    with pytest.raises(UsageError, match="'.*images' holds files that `xattn data prepare images` did not write: give"):
        write_image_records(source, source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".train-00000-of-00002.arrayrecord").mkdir()
    with pytest.raises(
        UsageError, match=r"'.*/train-00000-of-00002.arrayrecord' can't be written \(.*\): make room, or"
    ):
        write_image_records(source, tmp_path / "full", num_shards=2)
    write_image_records(source, out, num_shards=2)
    with pytest.raises(UsageError, match="was begun with --shards=2, but now it is 3: give the same number"):
        write_image_records(source, out, num_shards=3)
    for text in ("{", "[]", '{"format": "another"}'):
        (out / "manifest.json").write_text(text)
        with pytest.raises(UsageError, match="manifest.json' is none of `xattn data prepare images`: give an empty"):
            write_image_records(source, out, num_shards=2)
    (source / "val" / "dog" / "3.JPEG").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"'.*/val/dog/3.JPEG' can't be read \(.*\): replace or remove it"):
        write_image_records(source, tmp_path / "fresh")
