import numpy as np
import pytest

from xattn.config import UsageError
from xattn.data.mixing import mixup_cutmix


def batch_of(size, side=16):
    images = np.random.default_rng(0).integers(256, size=(size, side, side, 3), dtype=np.uint8)
    return {"image": images, "label": np.arange(size, dtype=np.int32) * 10}


def test_targets_name_the_image_and_the_one_before_it():
    mixed = mixup_cutmix(batch_of(6), np.arange(6))
    assert mixed["label"].tolist() == [0, 10, 20, 30, 40, 50]
    assert mixed["label_b"].tolist() == [50, 0, 10, 20, 30, 40]
    assert mixed["label_b"].dtype == np.int32 and mixed["mix"].dtype == np.float32


def test_the_first_half_is_blended_as_mix_says():
    batch = batch_of(8)
    mixed = mixup_cutmix(batch, np.arange(8))
    share = mixed["mix"][:4, None, None, None]
    blend = share * batch["image"][:4] + (1 - share) * np.roll(batch["image"], 1, 0)[:4]
    np.testing.assert_allclose(mixed["image"][:4], blend, atol=0.5 + 1e-4)


def test_the_second_half_has_a_box_of_the_image_and_mix_is_its_area():
    batch = batch_of(8)
    mixed = mixup_cutmix(batch, np.arange(8) + 100)
    for row in range(4, 8):
        own = (mixed["image"][row] == batch["image"][row]).all(-1)
        other = (mixed["image"][row] == batch["image"][row - 1]).all(-1)
        assert (own | other).all()
        rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        box = np.zeros_like(own)
        if len(rows):
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert (own == box).all() and mixed["mix"][row] == own.mean()
    assert len(set(mixed["mix"][4:].tolist())) > 1


def test_ratios_are_distributed_as_defined():
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)); a box covers less than u, which is 1/2 on average."""
    images = {"image": np.zeros((4000, 32, 32, 1), np.uint8), "label": np.zeros(4000, np.int32)}
    for alpha in (0.2, 1.0):
        share = mixup_cutmix(images, np.arange(4000), alpha=alpha)["mix"][:2000]
        assert abs(share.mean() - 0.5) < 0.05 and abs(share.var() - 1 / (4 * (2 * alpha + 1))) < 0.015
    area = mixup_cutmix(images, np.arange(4000))["mix"][2000:]
    assert 0.15 < area.mean() < 0.4 and area.min() == 0 and area.max() > 0.85


def test_one_image_alone_is_mixed_with_itself():
    batch = batch_of(1)
    mixed = mixup_cutmix(batch, np.array([0]))
    np.testing.assert_array_equal(mixed["image"], batch["image"])


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="mixup_cutmix needs an alpha above 0, but got 0.0"):
        mixup_cutmix(batch_of(2), np.arange(2), alpha=0.0)
    with pytest.raises(UsageError, match="mixup_cutmix mixes images and their labels, but the data has tokens: take"):
        mixup_cutmix({"tokens": np.zeros((2, 4), np.int32)}, np.arange(2))
