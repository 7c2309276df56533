import numpy as np
import pytest

from xattn.config import UsageError
from xattn.data.random_erasing import random_erasing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def flat(size, height=32, width=48):
    """Images of one level, so that what changed shows."""
    return {"image": np.full((size, height, width, 3), 7, np.uint8), "label": np.arange(size, dtype=np.int32)}


def boxes(images):
    """Height and width of what is no longer 7, for each image that changed; noise may hit 7 here and there."""
    sizes = []
    for image in images:
        changed = (image != 7).any(-1)
        if changed.any():
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            part = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert part.mean() > 0.95
            sizes.append(part.shape)
    return np.array(sizes)


def test_boxes_are_as_many_as_large_and_as_long_as_defined():
    batch = flat(2000)
    erased = random_erasing(batch, np.arange(2000), probability=0.25)
    assert (batch["image"] == 7).all()  # the batch that was given is left alone
    np.testing.assert_array_equal(erased["label"], batch["label"])
    height, width = boxes(erased["image"]).T
    assert abs(len(height) / 2000 - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)
    area, ratio = height * width / (32 * 48), height / width
    assert 0.01 < area.min() < 0.04 and 0.29 < area.max() < 0.36
    assert 0.25 < ratio.min() < 0.4 and 2.5 < ratio.max() < 4.2
    assert abs(np.log(ratio)).mean() == pytest.approx(np.log(1 / 0.3) / 2, abs=0.1)  # uniform: half of the largest
    assert (height < 32).all() and (width < 48).all()


def test_boxes_lie_everywhere():
    changed = (random_erasing(flat(2000), np.arange(2000), probability=1.0)["image"] != 7).any(-1).mean(0)
    assert changed.min() > 0
    assert changed[:, :24].mean() == pytest.approx(changed[:, 24:].mean(), abs=0.02)
    assert changed[:16].mean() == pytest.approx(changed[16:].mean(), abs=0.02)


def test_the_noise_is_normal_in_units_of_the_normalised_image():
    erased = random_erasing(flat(400), np.arange(400), probability=1.0, mean=(0.4, 0.5, 0.6), std=0.1)["image"]
    noise = erased[(erased != 7).all(-1)].reshape(-1, 3) / 255
    np.testing.assert_allclose(noise.mean(0), (0.4, 0.5, 0.6), atol=0.002)
    np.testing.assert_allclose(noise.std(0), 0.1, atol=0.002)
    assert abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.02
    clipped = random_erasing(flat(400), np.arange(400), probability=1.0, mean=MEAN, std=STD)["image"]
    blue = clipped[(clipped != 7).all(-1)][:, 2]
    assert (blue == 0).mean() == pytest.approx(0.0364, abs=0.005)  # P(N(0, 1) < (1 / 510 - 0.406) / 0.225)


def test_a_row_depends_on_its_seed_alone():
    whole = random_erasing(flat(8), np.arange(8), probability=0.5)["image"]
    for rows in (slice(0, 3), slice(3, 8)):
        one = {"image": flat(8)["image"][rows]}
        part = random_erasing(one, np.arange(8)[rows], probability=0.5)["image"]
        np.testing.assert_array_equal(part, whole[rows])
    assert (random_erasing(flat(8), np.arange(8), probability=0.0)["image"] == 7).all()


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="random_erasing erases parts of images, but the data has tokens: take"):
        random_erasing({"tokens": np.zeros((2, 4), np.int32)}, np.arange(2))
    with pytest.raises(UsageError, match="random_erasing needs a probability from 0 to 1, but got 25"):
        random_erasing(flat(2), np.arange(2), probability=25.0)
    with pytest.raises(UsageError, match="got a mean of 2 and a std of 1 numbers for images of 3 channels"):
        random_erasing(flat(2), np.arange(2), mean=(0.5, 0.5), std=0.1)
