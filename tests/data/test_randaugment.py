import numpy as np
import pytest
from PIL import Image

from xattn.config import UsageError
from xattn.data.randaugment import OPERATIONS, RandAugment

RAMP = np.stack(np.broadcast_arrays(np.arange(0, 240, 4), np.arange(0, 160, 4)[:, None], 77), -1).astype(np.uint8)


class Fixed(np.random.Generator):
    """Draws the same numbers again and again."""

    def __init__(self, uniform=0.0, integer=0):
        super().__init__(np.random.PCG64())
        self.uniform, self.integer = uniform, integer

    def random(self):
        return self.uniform

    def integers(self, high):
        return min(self.integer, high - 1)


def apply(name, magnitude, pixels=RAMP, **draws):
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), magnitude / 10, Fixed(**draws)))


def test_points_become_what_the_definitions_say():
    value = RAMP.astype(int)
    np.testing.assert_array_equal(apply("invert", 5), 255 - value)
    np.testing.assert_array_equal(apply("solarize", 5), np.where(value < 128, value, 255 - value))
    np.testing.assert_array_equal(apply("posterize", 5), value // 64 * 64)
    np.testing.assert_array_equal(apply("posterize", 1), value // 128 * 128)
    np.testing.assert_array_equal(apply("solarize_add", 5), np.where(value < 128, np.minimum(value + 55, 255), value))
    np.testing.assert_allclose(apply("brightness", 3), 0.64 * value, atol=1)
    grey = np.array([0.299, 0.587, 0.114]) @ np.moveaxis(value, -1, 0).reshape(3, -1)
    grey = grey.reshape(40, 60, 1)
    np.testing.assert_allclose(apply("color", 3), grey + 0.64 * (value - grey), atol=1.5)
    np.testing.assert_allclose(apply("contrast", 3), grey.mean() + 0.64 * (value - grey.mean()), atol=1.5)
    spread = apply("auto_contrast", 5)[..., 0]
    assert (spread.min(), spread.max()) == (0, 255)
    assert (apply("sharpness", 5, uniform=0.9) == RAMP).all()  # factor 1
    # Each level of a channel is equally frequent, so equalising spreads them evenly.
    np.testing.assert_allclose(np.diff(np.unique(apply("equalize", 5)[..., 0]))[:-1], 255 / 59, atol=1.5)


def test_shifts_are_in_pixels_and_go_both_ways():
    right = apply("translate_x", 1, uniform=0.9)
    np.testing.assert_array_equal(right[:, 10:], RAMP[:, :-10])
    assert (right[:, :10] == 128).all()
    np.testing.assert_array_equal(apply("translate_x", 1)[:, :-10], RAMP[:, 10:])
    np.testing.assert_array_equal(apply("translate_y", 2)[:-20], RAMP[20:])
    sheared = apply("shear_x", 10)  # row y shows columns from 0.3 y on
    np.testing.assert_array_equal(sheared[30, :20], RAMP[30, 9:29])
    assert (apply("shear_y", 10)[-1, -1] == 128).all()
    turned = apply("rotate", 10, np.full((41, 41, 3), 200, np.uint8))
    assert (turned[0, 0] == 128).all() and (turned[20, 20] == 200).all()


def test_cutout_is_a_square_around_the_point_cut_off_at_the_border():
    pixels = np.full((60, 80, 3), 200, np.uint8)
    cut = (apply("cutout", 2.5, pixels, integer=30) == 128).all(-1)
    assert cut.sum() == 20 * 20 and cut[20:40, 20:40].all()
    assert (apply("cutout", 2.5, pixels, integer=0) == 128).all(-1).sum() == 10 * 10


def test_strength_zero_changes_nothing_where_it_is_a_distance():
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "cutout", "solarize_add"):
        np.testing.assert_array_equal(apply(name, 0), RAMP, err_msg=name)


def test_layers_are_applied_one_after_the_other_and_all_operations_occur(monkeypatch):
    counts = {name: 0 for name in OPERATIONS}
    for name in OPERATIONS:

        def count(image, strength, rng, name=name):
            assert strength == 0.7
            counts[name] += 1
            return image

        monkeypatch.setitem(OPERATIONS, name, count)
    rng, image = np.random.default_rng(0), Image.fromarray(RAMP)
    for _ in range(800):
        RandAugment(4, 7)(image, rng)
    assert sum(counts.values()) == 3200 and len(counts) == 16
    assert all(abs(count - 200) < 5 * np.sqrt(200) for count in counts.values())


def test_the_same_generator_gives_the_same_image_of_the_same_size():
    def augmented(seed):
        return np.asarray(RandAugment(4, 2)(Image.fromarray(RAMP), np.random.default_rng(seed)))

    np.testing.assert_array_equal(augmented(3), augmented(3))
    assert len({augmented(seed).tobytes() for seed in range(20)}) > 15
    assert all(augmented(seed).shape == RAMP.shape for seed in range(20))


@pytest.mark.parametrize("layers, magnitude", [(-1, 5), (2, 11), (2, -0.5)])
def test_mistakes_are_named(layers, magnitude):
    with pytest.raises(UsageError, match=f"magnitude from 0 to 10, but got {layers} and {magnitude}"):
        RandAugment(layers, magnitude)
