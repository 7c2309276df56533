"""Oxford-IIIT Pet's layout, with a few images."""

import numpy as np
import pytest
from PIL import Image

from xattn import data
from xattn.config import UsageError
from xattn.data.pets import Pets

TRAINVAL = [
    ("Abyssinian_1", 1, 10),
    ("american_bulldog_12", 2, 60),
    ("Abyssinian_2", 1, 20),
    ("pug_9", 3, 90),
]
TEST = [("american_bulldog_3", 2, 130), ("Abyssinian_30", 1, 140)]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for name, rows in (("trainval.txt", TRAINVAL), ("test.txt", TEST)):
        lines = [f"{image} {number} {1 + number % 2} {number}\n" for image, number, _ in rows]
        (tmp_path / "annotations" / name).write_text("#Image CLASS-ID SPECIES BREED ID\n" + "".join(lines) + "\n")
        for image, _, level in rows:
            Image.new("RGB", (30, 24), (level, level, level)).save(tmp_path / "images" / f"{image}.jpg")
    return tmp_path


@pytest.mark.parametrize("split, rows", [("train", TRAINVAL), ("val", TEST), ("test", TEST)])
def test_images_and_labels_of_every_split(root, split, rows):
    source = data.build({"name": "pets", "root": str(root), "image_size": 16}, split=split)
    examples = [source.example(index, None) for index in range(source.num_examples)]
    assert [int(example["label"]) for example in examples] == [number - 1 for _, number, _ in rows]
    assert [round(example["image"].mean()) for example in examples] == [level for *_, level in rows]
    assert source.class_names == ["Abyssinian", "american_bulldog", "pug"]
    assert all(example["image"].shape == (16, 16, 3) for example in examples)


def test_training_augments_by_the_seed(root):
    pixels = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "images" / "Abyssinian_1.jpg")
    source = Pets("train", root, 16, {"name": "timm", "num_layers": 0}, decoder="fast")
    shown = [source.example(0, seed)["image"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(shown[0], shown[1])
    assert (shown[0] != shown[2]).any()


def test_mistakes_are_named(root):
    with pytest.raises(UsageError, match="pets has no split 'dev'"):
        Pets("dev", root)
    file = root / "images" / "Abyssinian_2.jpg"
    file.rename(root / "elsewhere.jpg")
    with pytest.raises(UsageError, match=f"trainval.txt' lists 1 of 4 images that are not there, such as '{file}'"):
        Pets("train", root)
    assert Pets("test", root).num_examples == 2
    listed = root / "annotations" / "test.txt"
    for line, sentence in (
        ("Abyssinian_30 1 1", "line 1 of '.*test.txt' is 'Abyssinian_30 1 1', but needs a name and three numbers"),
        ("Abyssinian_30 x 1 1", "line 1 of '.*test.txt' is 'Abyssinian_30 x 1 1', but needs a name and three numbers"),
        ("Abyssinian_30 0 1 1", "line 1 of '.*test.txt' is 'Abyssinian_30 0 1 1', but needs a name and three numbers"),
        ("Abyssinian_30 2 1 1", "'Abyssinian_30' in class 2, which trainval.txt calls 'american_bulldog': unpack"),
        ("Ragdoll_5 38 1 1", "'Ragdoll_5' in class 38, which trainval.txt calls '': unpack"),
        ("", "test.txt' lists no images: unpack"),
    ):
        listed.write_text(line + "\n")
        with pytest.raises(UsageError, match=sentence):
            Pets("test", root)
    (root / "annotations" / "trainval.txt").unlink()
    with pytest.raises(UsageError, match="there is no file '.*/trainval.txt': give the folder that holds images/"):
        Pets("test", root)
