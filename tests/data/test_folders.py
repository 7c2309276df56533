import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xattn.config import UsageError
from xattn.data.episodes import EpisodeSampler
from xattn.data.folders import ClassFolders
from xattn.data.pipeline import episode_batches
from xattn.data.transforms import center_crop, random_resized_crop


def write_image(path, level=0, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).convert(mode).save(path)


def write_folders(root, prefix="", splits=("train", "val", "test")):
    """Three splits of two classes; each image is filled with a level of its own."""
    for i, split in enumerate(splits):
        for j in range(2):
            for k, extension in enumerate(("png", "PNG", "jpg", "jpeg")):
                level = 100 * i + 40 * j + 10 * k
                write_image(root / f"{prefix}{split}" / f"n{i}{j}" / f"{k}.{extension}", level)
    return root


def write_tables(root, header="filename,label", row="{},{}", splits=("train", "val", "test")):
    for i, split in enumerate(splits):
        lines = [header]
        for k in (2, 0, 1):
            for j in (1, 0):
                name = f"{split}_{j}_{k}.jpg"
                write_image(root / "images" / name, 100 * i + 40 * j + 10 * k)
                lines.append(row.format(name, f"c{i}{j}"))
        (root / "split").mkdir(exist_ok=True)
        (root / "split" / f"{split}.csv").write_text("\n".join(lines) + "\n\n")
    return root


def levels(source):
    images = source.images(np.arange(source.num_images))
    assert images.dtype == np.uint8 and images.shape == (source.num_images, *source.image_shape)
    return images.mean((1, 2, 3)).round().astype(int).tolist()


@pytest.mark.parametrize("prefix", ["", "meta-"])
def test_class_folders(tmp_path, prefix):
    write_folders(tmp_path, prefix)
    (tmp_path / f"{prefix}val" / "n10" / "notes.txt").write_text("not an image")
    (tmp_path / f"{prefix}val" / "n10" / "._0.png").write_text("left by a desktop")
    (tmp_path / f"{prefix}val" / "list.txt").write_text("not a class")
    source = ClassFolders(tmp_path, "val", image_size=8)
    assert source.class_names == ["n10", "n11"]
    assert source.labels.tolist() == [0] * 4 + [1] * 4 and source.labels.dtype == np.int32
    assert source.groups is None and source.image_shape == (8, 8, 3)
    assert levels(source) == [100, 110, 120, 130, 140, 150, 160, 170]


@pytest.mark.parametrize(
    "header, row",
    [("filename,label", "{},{}"), ("filename, label, x1, x2", "{} , {}, 0.5, 7")],
    ids=["miniImageNet", "CUB"],
)
def test_split_tables(tmp_path, header, row):
    source = ClassFolders(str(write_tables(tmp_path, header, row)), "test", image_size=8)
    assert source.class_names == ["c20", "c21"]
    assert levels(source) == [200, 210, 220, 240, 250, 255]


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    write_folders(tmp_path)
    expected = ClassFolders(tmp_path, "train").files
    listing = os.listdir
    monkeypatch.setattr(Path, "iterdir", lambda self: (self / n for n in sorted(listing(self), reverse=True)))
    assert ClassFolders(tmp_path, "train").files == expected == sorted(expected)


def test_episodes_of_folders(tmp_path):
    source = ClassFolders(write_folders(tmp_path), "train", image_size=8)
    (batch,) = episode_batches(source, seed=0, ways=2, shots=1, queries=2, batch_size=3, num_steps=1)
    assert batch["support"].shape == (3, 2, 1, 8, 8, 3) and batch["query"].shape == (3, 4, 8, 8, 3)
    with pytest.raises(UsageError, match="Class 'n00' of class_folders .train. has 4 images"):
        EpisodeSampler(source, seed=0, ways=2, shots=1, queries=4)


def noise_folders(root):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        for k in range(2):
            pixels = rng.integers(256, size=(30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{k}.png")
    return root


def test_augmentation_depends_on_the_seed_of_the_image_alone(tmp_path):
    source = ClassFolders(noise_folders(tmp_path), "train", image_size=16, augment=True)
    together = source.images(np.array([[0, 1], [2, 3]]), np.array([[5, 6], [7, 8]]))
    np.testing.assert_array_equal(source.images(np.array(2), np.array(7)), together[1, 0])
    np.testing.assert_array_equal(source.images(np.array([3, 0]), np.array([8, 5]))[1], together[0, 0])
    assert (source.images(np.array(2), np.array(9)) != together[1, 0]).any()


def test_evaluation_does_not_augment(tmp_path):
    noise_folders(tmp_path)
    index = np.array([1])
    plain = ClassFolders(tmp_path, "train", image_size=16)
    np.testing.assert_array_equal(plain.images(index, np.array([3])), plain.images(index))
    augmenting = ClassFolders(tmp_path, "train", image_size=16, augment=True)
    np.testing.assert_array_equal(augmenting.images(index), plain.images(index))
    assert (augmenting.images(index, np.array([3])) != plain.images(index)).any()


def test_center_crop_takes_the_middle_84_of_92():
    pixels = np.random.default_rng(0).integers(256, size=(92, 92, 3), dtype=np.uint8)
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 84), pixels[4:88, 4:88])
    # Both sides are scaled to 92, so a wide image loses the same fraction on every side.
    ramp = Image.fromarray(np.tile(np.arange(184, dtype=np.uint8), (46, 1)))
    expected = 2 * np.arange(4, 88) + 0.5
    np.testing.assert_allclose(center_crop(ramp, 84)[40, :, 0], expected, atol=1)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    write_image(tmp_path / "train" / "a" / "0.png", 255, mode=mode)
    source = ClassFolders(tmp_path, "train", image_size=8, augment=True)
    assert (source.images(np.array([0])) == 255).all()
    assert (source.images(np.array([0]), np.array([1])) == 255).all()


def test_random_resized_crop_is_uniform_in_area_and_log_ratio():
    """Recovers the part that was cut from two ramps and compares its distribution with the definition."""
    side, size = 240, 8
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    image = Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8))
    areas, ratios, mirrored, lefts = [], [], [], []
    for seed in range(600):
        out = random_resized_crop(image, size, np.random.default_rng(seed)).astype(float)
        assert out.shape == (size, size, 3)
        steps = (out[size // 2, -2, 0] - out[size // 2, 1, 0]) / (size - 3)
        w = abs(steps) * size
        h = (out[-2, size // 2, 1] - out[1, size // 2, 1]) / (size - 3) * size
        areas.append(w * h / side**2)
        ratios.append(math.log(w / h))
        mirrored.append(steps < 0)
        lefts.append(out[:, :, 0].mean() / (side - 1))
    assert 0.06 < min(areas) < 0.12 and 0.9 < max(areas) < 1.05
    # A part fits if area <= exp(-|log ratio|); the mean area of those, integrated by hand, is 0.478.
    assert abs(np.mean(areas) - 0.478) < 0.03
    assert abs(np.mean(ratios)) < 0.04 and 0.25 < np.max(np.abs(ratios)) < math.log(4 / 3) + 0.06
    assert abs(np.mean(mirrored) - 0.5) < 0.08
    assert abs(np.mean(lefts) - 0.5) < 0.03


def test_random_resized_crop_of_a_strip_takes_its_middle():
    """No part of 8 % of a 400 x 4 strip is allowed to be so flat; the middle 5 x 4 is taken instead."""
    strip = np.zeros((4, 400, 3), np.uint8)
    strip[:, 198:203] = 255  # round(4 * 4 / 3) = 5 columns from (400 - 5) // 2 = 197
    out = random_resized_crop(Image.fromarray(strip), 10, np.random.default_rng(0))
    columns = out[5, :, 0] if out[5, -1, 0] == 255 else out[5, ::-1, 0]
    assert (out[0] == out[5]).all() and columns[0] == 0 and (columns[3:] == 255).all()


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(UsageError) as error:
        ClassFolders(tmp_path / "cub", "train")
    assert str(error.value) == (
        f"There is no folder '{tmp_path / 'cub'}': give the folder that holds the data set as root."
    )


def test_a_missing_split_is_named_with_the_layouts(tmp_path):
    write_folders(tmp_path, splits=("train",))
    with pytest.raises(UsageError) as error:
        ClassFolders(tmp_path, "test")
    assert str(error.value) == (
        f"'{tmp_path}' has no split 'test': expected {tmp_path}/test/<class>/*.jpg (or .jpeg, .png), "
        f"or {tmp_path}/images/ with {tmp_path}/split/test.csv."
    )


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(UsageError) as error:
        ClassFolders(tmp_path, "valid")
    assert str(error.value) == "class_folders has no split 'valid': choose one of train, val, test."


@pytest.mark.parametrize("write", [write_folders, write_tables])
def test_splits_that_share_a_class_are_refused(tmp_path, write):
    write(tmp_path)
    if write is write_folders:
        write_image(tmp_path / "test" / "n01" / "0.png")
    else:
        with (tmp_path / "split" / "test.csv").open("a") as table:
            table.write("test_0_0.jpg,c01\n")
    name = "n01" if write is write_folders else "c01"
    for split, other in (("train", "test"), ("test", "train")):
        with pytest.raises(UsageError) as error:
            ClassFolders(tmp_path, split)
        assert str(error.value) == (
            f"'{tmp_path}' has 1 classes in both {split} and {other}, such as '{name}': "
            "few-shot splits must not share a class, so remove it from one of them."
        )
    ClassFolders(tmp_path, "val")


def test_listed_files_that_are_missing_are_counted(tmp_path):
    write_tables(tmp_path)
    (tmp_path / "images" / "train_0_1.jpg").unlink()
    (tmp_path / "images" / "train_1_1.jpg").unlink()
    with pytest.raises(UsageError) as error:
        ClassFolders(tmp_path, "train")
    assert str(error.value) == (
        f"'{tmp_path / 'split' / 'train.csv'}' lists 2 files that are not there, such as "
        f"'{tmp_path / 'images' / 'train_1_1.jpg'}': put the images into {tmp_path / 'images'}."
    )


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a.jpg,c\n", "must begin with the header 'filename,label', but begins with [['a.jpg', 'c']]."),
        ("", "must begin with the header 'filename,label', but begins with []."),
        ("filename,label\na.jpg\n", "is ['a.jpg'], but needs a filename and a label."),
    ],
)
def test_malformed_tables_are_named(tmp_path, text, sentence):
    table = tmp_path / "split" / "train.csv"
    table.parent.mkdir()
    table.write_text(text)
    with pytest.raises(UsageError) as error:
        ClassFolders(tmp_path, "train")
    assert str(table) in str(error.value) and str(error.value).endswith(sentence)


def test_a_file_that_is_no_image_is_named(tmp_path):
    write_folders(tmp_path)
    broken = tmp_path / "train" / "n00" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UsageError) as error:
        ClassFolders(tmp_path, "train").images(np.array([1, 0]))
    assert str(error.value).startswith(f"'{broken}' can't be read as an image")
