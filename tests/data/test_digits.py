import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from xattn.config import UsageError
from xattn.data import digits
from xattn.data.digits import Digits


def pixels(source):
    return np.stack([source.example(index, None)["image"] for index in range(source.num_examples)])


def test_the_splits_divide_the_set_class_by_class():
    splits = {split: Digits(split) for split in ("train", "val", "test")}
    assert {split: source.num_examples for split, source in splits.items()} == {"train": 1248, "val": 185, "test": 364}
    together = np.concatenate([pixels(source).reshape(-1, 64) for source in splits.values()])
    whole = load_digits().data * (255 / 16)
    np.testing.assert_allclose(together[np.lexsort(together.T)], whole[np.lexsort(whole.T)], atol=0.5)
    for source, share in ((splits["val"], 0.1), (splits["test"], 0.2)):
        labels = [int(source.example(index, None)["label"]) for index in range(source.num_examples)]
        np.testing.assert_allclose(np.bincount(labels) / np.bincount(load_digits().target), share, atol=0.01)


def test_images_keep_their_labels_and_use_all_levels():
    source = Digits("test")
    example = source.example(5, 7)
    assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.uint8
    assert example["label"].dtype == np.int32 and example["label"].shape == ()
    whole = load_digits()
    index = np.flatnonzero((np.rint(whole.images * (255 / 16)) == example["image"][..., 0]).all((1, 2)))
    assert whole.target[index].tolist() == [example["label"]]
    assert set(np.unique(pixels(source)).tolist()) == {round(level * 255 / 16) for level in range(17)}


def test_one_permutation_moves_the_pixels_of_all_images_in_all_splits():
    order = np.random.default_rng(3).permutation(64)
    assert (order != np.arange(64)).any()
    for split in ("train", "test"):
        plain, permuted = pixels(Digits(split)), pixels(Digits(split, permute_pixels=3))
        np.testing.assert_array_equal(permuted.reshape(-1, 64), plain.reshape(-1, 64)[:, order])


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(UsageError, match="digits has no split 'dev': choose one of train, val, test"):
        Digits("dev")
    with pytest.raises(UsageError, match="permute_pixels of at least 0, but got -1"):
        Digits("val", permute_pixels=-1)
    digits._load.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"scikit-learn, which is not installed: pip install 'xattn\[digits\]'"):
        Digits("val")
