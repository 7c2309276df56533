"""CIFAR's published binary files, with a handful of images each."""

import numpy as np
import pytest

from xattn import data
from xattn.config import UsageError
from xattn.data.cifar import Cifar10, Cifar100

# Labels by file. Images are planes of one level a channel: the file's number, the place in it, and the label.
LABELS10 = {f"data_batch_{number}.bin": [number, 9, 0] for number in range(1, 6)} | {"test_batch.bin": [3, 1]}
LABELS100 = {"train.bin": [5, 99, 0, 42], "test.bin": [7, 98]}


def image(file, place, label):
    rows = np.zeros((3, 32, 32), np.uint8)
    rows[0], rows[1], rows[2] = 10 * file, 20 * place, 2 * label
    rows[0, 0, 5] = 255  # red, in the upper row, in the sixth column
    return rows


@pytest.fixture
def root(tmp_path):
    ten, hundred = tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-100-binary"
    for folder, files, coarse in ((ten, LABELS10, b""), (hundred, LABELS100, b"\x13")):
        folder.mkdir()
        for number, (name, labels) in enumerate(files.items()):
            records = [
                coarse + bytes([label]) + image(number, place, label).tobytes() for place, label in enumerate(labels)
            ]
            (folder / name).write_bytes(b"".join(records))
    # The published list of ten ends with an empty line.
    (ten / "batches.meta.txt").write_text("".join(f"class{number}\n" for number in range(10)) + "\n")
    (hundred / "fine_label_names.txt").write_text("".join(f"fine{number}\n" for number in range(100)))
    (hundred / "coarse_label_names.txt").write_text("".join(f"coarse{number}\n" for number in range(20)))
    return tmp_path


def expected(files, names):
    """(image [32, 32, 3], label) of every image of the files."""
    numbers = {name: number for number, name in enumerate(files)}
    return [
        (image(numbers[name], place, label).transpose(1, 2, 0), label)
        for name in names
        for place, label in enumerate(files[name])
    ]


@pytest.mark.parametrize("source, files", [(Cifar10, LABELS10), (Cifar100, LABELS100)])
def test_images_and_labels_of_every_split(root, source, files):
    names = list(files)
    # timm's evaluation at the images' own size, without a margin, shows them as they are.
    options = {"image_size": 32, "transform": {"name": "timm", "crop_fraction": 1.0}}
    for split, shown in (("train", names[:-1]), ("val", names[-1:]), ("test", names[-1:])):
        opened = source(split, root, **options)
        wanted = expected(files, shown)
        assert opened.num_examples == len(wanted)
        for index, (pixels, label) in enumerate(wanted):
            example = opened.example(index, None)
            np.testing.assert_array_equal(example["image"], pixels)
            assert example["label"] == label and example["label"].dtype == np.int32
    inside = source("test", root / source.folder, **options)
    np.testing.assert_array_equal(inside.example(1, None)["image"], wanted[1][0])


def test_classes_have_their_fine_names(root):
    assert Cifar10("val", root).class_names == [f"class{number}" for number in range(10)]
    assert Cifar100("val", root).class_names == [f"fine{number}" for number in range(100)]


def test_training_scales_and_augments_by_the_seed(root):
    config = {"name": "cifar10", "root": str(root), "image_size": 48, "transform": {"name": "timm"}, "decoder": "fast"}
    source = data.build(config, split="train")
    shown = [source.example(0, seed)["image"] for seed in (0, 0, 1)]
    assert all(pixels.shape == (48, 48, 3) for pixels in shown)
    np.testing.assert_array_equal(shown[0], shown[1])
    assert (shown[0] != shown[2]).any()


def test_mistakes_are_named(root):
    folder = root / "cifar-10-batches-bin"
    with pytest.raises(UsageError, match="cifar10 has no split 'dev'"):
        Cifar10("dev", root)
    batch = folder / "data_batch_3.bin"
    whole = batch.read_bytes()
    for cut in (whole[:-1], b""):
        batch.write_bytes(cut)
        with pytest.raises(UsageError) as error:
            Cifar10("train", root)
        assert str(error.value) == (
            f"'{batch}' has {len(cut)} bytes, which is no multiple of the 3073 that an image has: unpack or download "
            "the archive again."
        )
    assert Cifar10("test", root).num_examples == 2
    batch.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(UsageError, match="has the label 10, but batches.meta.txt names 10 classes: unpack or download"):
        Cifar10("train", root)
    for name in ("batches.meta.txt", "data_batch_3.bin"):
        (folder / name).unlink()
        with pytest.raises(UsageError, match=f"there is no file '.*/{name}': give the folder that holds cifar-10"):
            Cifar10("train", root)
