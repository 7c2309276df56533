import numpy as np
import pytest
from PIL import Image

from xattn.config import UsageError
from xattn.data.timm_augment import OPERATIONS, TimmRandAugment

RAMP = np.stack(np.broadcast_arrays(np.arange(0, 240, 4), np.arange(0, 160, 4)[:, None], 77), -1).astype(np.uint8)
FILL = (124, 116, 104)


def apply(name, m, pixels=RAMP):
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), m))


@pytest.mark.parametrize("sign", [1, -1])
def test_levels_become_what_the_definitions_say(sign):
    value = RAMP.astype(int)
    np.testing.assert_array_equal(apply("invert", sign * 0.9), 255 - value)
    for m, step in ((0.2, 16), (0.3, 32), (0.9, 128), (1.0, 256)):
        np.testing.assert_array_equal(apply("posterize", sign * m), value // step * step)
    for m, first in ((0.0, 256), (0.5, 128), (0.9, 26), (1.0, 0)):
        np.testing.assert_array_equal(apply("solarize", sign * m), np.where(value < first, value, 255 - value))
    np.testing.assert_array_equal(
        apply("solarize_add", sign * 0.95), np.where(value < 128, np.minimum(value + 104, 255), value)
    )
    spread = apply("auto_contrast", sign * 0.9)[..., 0]
    assert (spread.min(), spread.max()) == (0, 255)
    # Each level of a channel is equally frequent, so equalising spreads them evenly.
    np.testing.assert_allclose(np.diff(np.unique(apply("equalize", sign)[..., 0]))[:-1], 255 / 59, atol=1.5)


@pytest.mark.parametrize("m, factor", [(0.0, 1.0), (0.5, 1.45), (-0.5, 0.55), (-1.0, 0.1)])
def test_factors_move_away_from_one_to_either_side(m, factor):
    value = RAMP.astype(float)
    np.testing.assert_allclose(apply("brightness", m), np.clip(factor * value, 0, 255), atol=1)
    grey = (value @ [0.299, 0.587, 0.114])[..., None]
    np.testing.assert_allclose(apply("color", m), np.clip(grey + factor * (value - grey), 0, 255), atol=2)
    mean = grey.mean()
    np.testing.assert_allclose(apply("contrast", m), np.clip(mean + factor * (value - mean), 0, 255), atol=2)
    dot = np.zeros((7, 7, 3), np.uint8)
    dot[3, 3] = 130  # Pillow's smoothing has the weight 5/13 in the middle
    assert abs(apply("sharpness", m, dot)[3, 3, 0] - min(255, 50 + factor * 80)) <= 1


def test_shifts_are_parts_of_the_width_and_height_and_go_both_ways():
    left = apply("translate_x", 1.0)  # 27 of 60 pixels
    np.testing.assert_array_equal(left[:, :-27], RAMP[:, 27:])
    assert (left[:, -27:] == FILL).all()
    np.testing.assert_array_equal(apply("translate_x", -1.0)[:, 27:], RAMP[:, :-27])
    up = apply("translate_y", 0.5)  # 9 of 40 pixels
    np.testing.assert_array_equal(up[:-9], RAMP[9:])
    assert (up[-9:] == FILL).all()
    np.testing.assert_array_equal(apply("translate_y", -0.5)[9:], RAMP[:-9])


def test_shears_and_turns_read_between_the_pixels():
    """Column x of row y shows the level at x + 0.3 (y + 1/2), which on a ramp of 4 levels a pixel is nearly exact."""
    rows, columns = np.mgrid[5:35, 15:40]
    for m in (1.0, -1.0, 0.5):
        expected = 4 * (columns + 0.3 * m * (rows + 0.5))
        np.testing.assert_allclose(apply("shear_x", m)[5:35, 15:40, 0], expected, atol=1.5)
    rows, columns = np.mgrid[20:22, 5:50]
    expected = 4 * (rows + 0.3 * 0.5 * (columns + 0.5))
    np.testing.assert_allclose(apply("shear_y", 0.5)[20:22, 5:50, 1], expected, atol=1.5)
    turned = apply("rotate", 1.0, np.full((41, 41, 3), 200, np.uint8))
    assert (turned[0, 0] == FILL).all() and (turned[20, 20] == 200).all()
    rows, columns = np.mgrid[15:25, 20:40]
    x, y = columns + 0.5 - 30, rows + 0.5 - 20  # from the middle
    for sign in (1, -1):
        cos, sin = np.cos(np.pi / 6), sign * np.sin(np.pi / 6)
        part = apply("rotate", sign)[15:25, 20:40]
        np.testing.assert_allclose(part[..., 0], 4 * (29.5 + cos * x - sin * y), atol=1.5)
        np.testing.assert_allclose(part[..., 1], 4 * (19.5 + sin * x + cos * y), atol=1.5)
    edge = np.full((20, 20, 3), 100, np.uint8)
    edge[:, 10:] = 200
    sheared = apply("shear_x", 0.5, edge)[5:15, 2:15]
    assert sheared.min() < 97 and sheared.max() > 203  # bilinear reading would stay between the two


def test_strength_zero_changes_nothing_but_where_it_has_none():
    for name in OPERATIONS:
        if name not in ("auto_contrast", "equalize", "invert", "posterize"):
            np.testing.assert_array_equal(apply(name, 0.0), RAMP, err_msg=name)


def test_operations_strengths_and_signs_are_drawn_as_defined(monkeypatch):
    seen = {name: [] for name in OPERATIONS}
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda image, m, name=name: seen[name].append(m) or image)
    rng, image = np.random.default_rng(0), Image.fromarray(RAMP)
    augment = TimmRandAugment(num_layers=3, magnitude=9, magnitude_std=0.5)
    for _ in range(4000):
        assert augment(image, rng) is image
    counts = np.array([len(strengths) for strengths in seen.values()])  # 12000 draws, half of which act
    assert len(counts) == 15 and (abs(counts - 400) < 5 * np.sqrt(400)).all()
    strengths = np.concatenate([*seen.values()])
    assert abs((strengths > 0).mean() - 0.5) < 0.03
    levels = 10 * np.abs(strengths)
    inside = levels[levels < 10]
    assert levels.max() == 10 and abs((levels == 10).mean() - 0.0228) < 0.008  # two standard deviations above the mean
    assert abs(inside.mean() - (9 - 0.5 * 0.0540 / 0.9772)) < 0.02 and abs(np.median(levels) - 9) < 0.03


def test_without_deviation_all_have_the_same_strength(monkeypatch):
    seen = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda image, m: seen.append(abs(m)) or image)
    rng = np.random.default_rng(0)
    for _ in range(50):
        TimmRandAugment(2, 7, 0)(Image.fromarray(RAMP), rng)
    assert set(seen) == {0.7}


def test_the_same_generator_gives_the_same_image_of_the_same_size():
    def augmented(seed, num_layers=2):
        return np.asarray(TimmRandAugment(num_layers)(Image.fromarray(RAMP), np.random.default_rng(seed)))

    np.testing.assert_array_equal(augmented(3), augmented(3))
    assert len({augmented(seed).tobytes() for seed in range(20)}) > 10  # a quarter stays as it is
    assert all(augmented(seed).shape == RAMP.shape for seed in range(20))
    np.testing.assert_array_equal(augmented(0, num_layers=0), RAMP)


@pytest.mark.parametrize("layers, magnitude, std", [(-1, 5, 0.5), (2, 11, 0.5), (2, 9, -1)])
def test_mistakes_are_named(layers, magnitude, std):
    with pytest.raises(UsageError, match=f"at least 0, but got {layers}, {magnitude} and {std}"):
        TimmRandAugment(layers, magnitude, std)
