import numpy as np
import pytest

from xattn.config import UsageError
from xattn.data.mixing import mixup_cutmix, mixup_or_cutmix


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


def test_a_whole_batch_is_mixed_with_itself_reversed_by_one_share():
    batch = batch_of(6)
    images, others, kinds = batch["image"], batch["image"][::-1], set()
    for seed in range(20):
        mixed = mixup_or_cutmix(batch, np.arange(seed, seed + 6))
        assert mixed["label"].tolist() == [0, 10, 20, 30, 40, 50]
        assert mixed["label_b"].tolist() == [50, 40, 30, 20, 10, 0]
        assert (mixed["label_b"].dtype, mixed["mix"].dtype, mixed["image"].dtype) == (np.int32, np.float32, np.uint8)
        (share,) = set(mixed["mix"].tolist())
        pasted = (mixed["image"] == others).all(-1)
        if ((mixed["image"] == images).all(-1) | pasted).all():
            kinds.add("cutmix")
            box = np.zeros((16, 16), bool)
            box[np.ix_(pasted.all(0).any(1), pasted.all(0).any(0))] = True
            assert (pasted == box).all() and share == pytest.approx(1 - box.mean())
        else:
            kinds.add("mixup")
            np.testing.assert_allclose(mixed["image"], share * images + (1 - share) * others, atol=0.5 + 1e-4)
    assert kinds == {"mixup", "cutmix"}
    np.testing.assert_array_equal(batch["image"], images)


def shares(count=1000, **options):
    """The shares of so many batches, and whether CutMix mixed them: each image has one level only."""
    batch = {"image": np.array([0, 200], np.uint8).reshape(2, 1, 1, 1), "label": np.zeros(2, np.int32)}
    batch["image"] = np.broadcast_to(batch["image"], (2, 24, 24, 1))
    mixed = [mixup_or_cutmix(batch, np.array([seed, 0]), **options) for seed in range(count)]
    share = np.array([result["mix"][0] for result in mixed])
    cutmix = np.array([np.isin(result["image"], (0, 200)).all() for result in mixed]) & (share < 1)
    return share, cutmix


def test_shares_of_batches_are_distributed_as_defined():
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)); a box that the border cuts leaves more of the image."""
    share, cutmix = shares(mixup_alpha=0.8, cutmix_alpha=0.0)
    assert abs(share.mean() - 0.5) < 0.04 and abs(share.var() - 1 / (4 * 2.6)) < 0.01 and cutmix.mean() < 0.03
    share, cutmix = shares(mixup_alpha=0.0, cutmix_alpha=1.0)
    assert cutmix[share < 1].all() and 0.6 < share.mean() < 0.9 and share.min() < 0.2
    share, cutmix = shares(switch_probability=0.25)
    assert 0.2 < cutmix.mean() < 0.31
    share, cutmix = shares(probability=0.25, cutmix_alpha=0.0)
    assert abs((share < 1).mean() - 0.25) < 0.05
    share, _ = shares(probability=0.0)
    assert (share == 1).all()


def test_mistakes_in_mixing_whole_batches_are_named():
    with pytest.raises(UsageError, match="at least 0, and not both 0, but got 0.0 and 0.0"):
        mixup_or_cutmix(batch_of(2), np.arange(2), mixup_alpha=0.0, cutmix_alpha=0.0)
    with pytest.raises(UsageError, match="at least 0, and not both 0, but got -1.0 and 1.0"):
        mixup_or_cutmix(batch_of(2), np.arange(2), mixup_alpha=-1.0)
    with pytest.raises(UsageError, match="switch_probability from 0 to 1, but got 1.0 and 2.0"):
        mixup_or_cutmix(batch_of(2), np.arange(2), switch_probability=2.0)
    with pytest.raises(UsageError, match="can't both mix a batch: take one of them out"):
        mixup_or_cutmix(mixup_cutmix(batch_of(2), np.arange(2)), np.arange(2))
    with pytest.raises(UsageError, match="mixup_or_cutmix mixes images and their labels, but the data has image: take"):
        mixup_or_cutmix({"image": batch_of(2)["image"]}, np.arange(2))
