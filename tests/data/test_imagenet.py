import logging
import struct

import grain
import numpy as np
import pytest
from PIL import Image

from xattn.config import UsageError
from xattn.data.imagenet import Imagenet, ImagenetArrayRecord
from xattn.data.prepare import write_image_records
from xattn.data.transforms import eval_crop, image_transform


def write_image(path, level, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).convert("RGB").save(path)


def write_folders(root, splits=("train", "val")):
    """Four classes in train, two of which val has too; each image is filled with a level of its own."""
    for i, split in enumerate(splits):
        for j in range(4) if i == 0 else (1, 3):
            for k, extension in enumerate(("JPEG", "png")):
                write_image(root / split / f"n{j:08d}" / f"{split}_{k}.{extension}", 100 * i + 20 * j + 5 * k)
        (root / split / "n00000001" / "._left_by_a_desktop.png").write_text("")
    return root


def levels(source):
    examples = [source.example(index, None) for index in range(source.num_examples)]
    assert all(example["image"].shape == (16, 16, 3) and example["label"].shape == () for example in examples)
    return [(round(example["image"].mean()), int(example["label"])) for example in examples]


TRAIN = [(20 * label + 5 * k, label) for label in range(4) for k in range(2)]
VAL = [(100 + 20 * label + 5 * k, label) for label in (1, 3) for k in range(2)]


@pytest.mark.parametrize("val", ["val", "validation"])
def test_labels_number_the_classes_of_train(tmp_path, val):
    write_folders(tmp_path, ("train", val))
    assert levels(Imagenet("train", tmp_path, 16)) == TRAIN
    assert levels(Imagenet("val", str(tmp_path), 16)) == VAL
    assert levels(Imagenet("test", tmp_path, 16)) == VAL
    assert Imagenet("val", tmp_path).class_names == [f"n{j:08d}" for j in range(4)]


def test_a_folder_test_is_read_only_if_it_has_classes(tmp_path):
    write_folders(tmp_path)
    write_image(tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG", 0)
    assert levels(Imagenet("test", tmp_path, 16)) == VAL
    write_image(tmp_path / "test" / "n00000002" / "a.png", 7)
    assert levels(Imagenet("test", tmp_path, 16)) == [(7, 2)]


def test_the_transform_is_what_the_config_says(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "train" / "a" / "0.png")
    image = Image.fromarray(pixels)
    plain = Imagenet("train", tmp_path, 16)
    np.testing.assert_array_equal(plain.example(0, None)["image"], eval_crop(image, 16))
    strong = Imagenet("train", tmp_path, 16, {"name": "perceiver_io", "num_layers": 4, "magnitude": 9})
    np.testing.assert_array_equal(strong.example(0, None)["image"], eval_crop(image, 16))
    pairs = [(plain.example(0, seed)["image"], strong.example(0, seed)["image"]) for seed in range(8)]
    assert sum((one != other).any() for one, other in pairs) >= 7
    options = {"name": "timm", "crop_fraction": 0.5}
    timm = Imagenet("train", tmp_path, 16, options)
    np.testing.assert_array_equal(timm.example(0, None)["image"], image_transform(options).evaluate(image, 16))


def damage(path):
    path.write_bytes(path.read_bytes()[:40])


def test_damaged_images_are_named(tmp_path):
    write_folders(tmp_path)
    broken = tmp_path / "train" / "n00000001" / "train_0.JPEG"
    damage(broken)
    with pytest.raises(UsageError) as error:
        Imagenet("train", tmp_path, 16).example(2, None)
    assert str(error.value).startswith(f"'{broken}' can't be read as an image")
    assert str(error.value).endswith("replace or remove it, or set config.data.skip_damaged.")


def test_damaged_images_are_skipped_if_asked_with_a_warning_each(tmp_path, caplog):
    write_folders(tmp_path)
    files = [tmp_path / "train" / "n00000003" / f"train_{name}" for name in ("0.JPEG", "1.png")]
    for file in files:
        damage(file)
    with caplog.at_level(logging.WARNING, "absl"):
        source = Imagenet("train", tmp_path, 16, skip_damaged=True)
        assert levels(source) == [*TRAIN[:6], TRAIN[0], TRAIN[0]]
        assert levels(source)[-1] == TRAIN[0]
    assert [record.getMessage() for record in caplog.records] == [
        f"'{file}' can't be read; the next image takes its place ({count} damaged so far)."
        for count, file in enumerate(files, start=1)
    ]
    for file in (tmp_path / "train").rglob("train_*"):
        damage(file)
    with pytest.raises(UsageError, match=r"none of the 8 images of imagenet \(train\) can be read"):
        source.example(0, None)


def test_records_give_the_same_examples_as_the_folders(tmp_path):
    folders, records = write_folders(tmp_path / "folders"), tmp_path / "records"
    write_image_records(folders, records, num_shards=3)
    assert sorted(path.name for path in records.iterdir()) == [
        "classes.txt",
        "manifest.json",
        *(f"train-0000{shard}-of-00003.arrayrecord" for shard in range(3)),
        *(f"val-0000{shard}-of-00003.arrayrecord" for shard in range(3)),
    ]
    for split, expected in (("train", TRAIN), ("val", VAL), ("test", VAL)):
        source = ImagenetArrayRecord(split, records, 16)
        assert sorted(levels(source)) == sorted(expected)
        assert source.class_names == Imagenet("train", folders).class_names
    packed = ImagenetArrayRecord("train", records, 16)
    place = levels(packed).index(TRAIN[5])
    np.testing.assert_array_equal(
        packed.example(place, 7)["image"], Imagenet("train", folders, 16).example(5, 7)["image"]
    )


def test_a_record_is_the_label_and_the_file(tmp_path):
    folders = write_folders(tmp_path)
    write_image_records(folders, tmp_path / "records", num_shards=1)
    data = grain.sources.ArrayRecordDataSource(str(tmp_path / "records" / "val-00000-of-00001.arrayrecord"))
    assert data[2] == struct.pack("<i", 3) + (tmp_path / "val" / "n00000003" / "val_0.JPEG").read_bytes()


def test_damaged_records_are_named(tmp_path):
    write_folders(tmp_path)
    damage(tmp_path / "val" / "n00000001" / "val_1.png")
    write_image_records(tmp_path, tmp_path / "records", num_shards=1)
    with pytest.raises(UsageError, match="record 1 of val can't be read as an image"):
        ImagenetArrayRecord("val", tmp_path / "records", 16).example(1, None)
    assert levels(ImagenetArrayRecord("val", tmp_path / "records", 16, skip_damaged=True))[1] == VAL[2]


@pytest.mark.parametrize("end", [0, 100, -1])
def test_files_of_records_that_are_cut_short_are_named(tmp_path, end):
    write_image_records(write_folders(tmp_path), tmp_path / "records", num_shards=3)
    shard = tmp_path / "records" / "val-00001-of-00003.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(UsageError, match="val-00001-of-00003.arrayrecord' is damaged or cut short .*: copy it again"):
        ImagenetArrayRecord("val", tmp_path / "records")
    assert levels(ImagenetArrayRecord("train", tmp_path / "records", 16))


def test_damage_inside_of_a_file_of_records_is_named(tmp_path):
    write_image_records(write_folders(tmp_path), tmp_path / "records", num_shards=1)
    shard = tmp_path / "records" / "val-00000-of-00001.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[120] ^= 255  # in the first record: it begins after the signature and its header, at 104
    shard.write_bytes(data)
    source = ImagenetArrayRecord("val", tmp_path / "records", 16)
    with pytest.raises(UsageError, match="record 0 of val can't be read .*: copy the .arrayrecord files again"):
        source.example(0, None)
    assert source.example(1, None)["label"] == 1


def test_records_without_their_class_names_are_refused(tmp_path):
    write_image_records(write_folders(tmp_path), tmp_path / "records", num_shards=1)
    (tmp_path / "records" / "classes.txt").unlink()
    with pytest.raises(UsageError, match="'.*records' has no classes.txt: copy it too, or give the command"):
        ImagenetArrayRecord("train", tmp_path / "records")


def test_mistakes_are_named(tmp_path):
    for source in (Imagenet, ImagenetArrayRecord):
        with pytest.raises(UsageError, match="folder of the data set is not given: add --config.data.root=DIR"):
            source("train")
        with pytest.raises(UsageError, match="There is no folder '.*/none'"):
            source("train", tmp_path / "none")
        with pytest.raises(UsageError, match=f"{source.name} has no split 'dev': choose one of train, val, test"):
            source("dev", tmp_path)
    with pytest.raises(UsageError, match=r"has no split 'val': expected .*/val/<class>/\*.JPEG"):
        Imagenet("val", tmp_path)
    with pytest.raises(UsageError, match=r"has no files train-\*-of-\*.arrayrecord: write them with `xattn data prep"):
        ImagenetArrayRecord("train", tmp_path)
    write_folders(tmp_path)
    with pytest.raises(UsageError, match="config.data.transform has no key 'layers': did you mean 'num_layers'"):
        Imagenet("train", tmp_path, transform={"name": "perceiver_io", "layers": 2})
    write_image_records(tmp_path, tmp_path / "records", num_shards=2)
    (tmp_path / "records" / "train-00001-of-00002.arrayrecord").unlink()
    with pytest.raises(UsageError, match=r"has 1 of the 2 files train-\*: copy the others too, or give the command"):
        ImagenetArrayRecord("train", tmp_path / "records")
    write_image(tmp_path / "val" / "n00000009" / "a.png", 0)
    with pytest.raises(UsageError, match="has 1 classes that '.*train' doesn't have, such as 'n00000009': both need"):
        Imagenet("val", tmp_path)
    (tmp_path / "empty" / "train" / "a").mkdir(parents=True)
    with pytest.raises(UsageError, match="has no images: expected"):
        Imagenet("train", tmp_path / "empty")
