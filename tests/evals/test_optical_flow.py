"""End-point error, tiles, and the colours of flow."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.evals.toys import config, toy
from xattn import data, evals, tasks
from xattn.config import UsageError
from xattn.evals.flow_picture import color_wheel, draw_flow, flow_colors
from xattn.evals.optical_flow import predict_flow, tile_starts, tile_weights

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (3, 2, 7, 9, 3), dtype=np.uint8)
FLOW = (3 * RNG.normal(size=(3, 7, 9, 2))).astype(np.float32)
VALID = RNG.random((3, 7, 9)) < 0.7


class Red(nn.Module):
    """Reads its flow off the pixels: (red of the first frame, red of the second), or the mean of these."""

    mean: bool = False

    def __call__(self, patches, *, train=False):
        flow = jnp.moveaxis(patches[..., 12], 1, -1)  # the centre of each neighbourhood
        return jnp.broadcast_to(flow.mean((1, 2), keepdims=True), flow.shape) if self.mean else flow


@pytest.fixture(autouse=True)
def source(monkeypatch):
    monkeypatch.setitem(data.SOURCES, "toy", toy(test={"frames": FRAMES, "flow": FLOW, "valid": VALID}))


def run(**options):
    return evals.run(dict(name="optical_flow", **options), Red(), {}, config("optical_flow"))


def predict(model, **tiles):
    return predict_flow(model, {}, tasks.build(dict(name="optical_flow")), FRAMES, **tiles)


def red():
    return np.moveaxis(20 * (FRAMES[..., 0] / 255.0 * 2 - 1), 1, -1)


def test_errors_are_means_over_valid_pixels_pair_by_pair():
    result = run()
    pairs = [np.linalg.norm(red()[i] - FLOW[i], axis=-1)[VALID[i]].mean() for i in range(3)]
    zero = [np.linalg.norm(FLOW[i], axis=-1)[VALID[i]].mean() for i in range(3)]
    np.testing.assert_allclose(result["per_example"], pairs, rtol=1e-5)
    assert result["epe"] == pytest.approx(np.mean(pairs), rel=1e-5)
    assert result["zero_epe"] == pytest.approx(np.mean(zero), rel=1e-5)
    assert result["metric"] == "epe"


def test_pairs_without_truth_are_left_out(monkeypatch):
    valid = VALID.copy()
    valid[1] = False
    monkeypatch.setitem(data.SOURCES, "toy", toy(test={"frames": FRAMES, "flow": FLOW, "valid": valid}))
    result = run()
    pairs = [np.linalg.norm(red()[i] - FLOW[i], axis=-1)[VALID[i]].mean() for i in (0, 2)]
    np.testing.assert_allclose(result["per_example"], pairs, rtol=1e-5)
    assert result["epe"] == pytest.approx(np.mean(pairs), rel=1e-5)


def test_tiles_do_not_change_a_model_that_looks_at_one_pixel():
    np.testing.assert_allclose(predict(Red(), tile=(4, 5), overlap=2), red(), rtol=1e-4, atol=1e-4)
    assert run(tile=(4, 5), overlap=2, batch_size=2)["epe"] == pytest.approx(run()["epe"], rel=1e-5)


def test_overlapping_tiles_are_averaged_by_their_distance_to_the_border():
    """Each tile predicts the mean of its own pixels; weights by loops over the pixels of a 7 x 9 image."""
    flow = predict(Red(mean=True), tile=(4, 6), overlap=1)
    starts = [(y, x) for y in (0, 3) for x in (0, 3)]
    for y in range(7):
        for x in range(9):
            total = weight = 0.0
            for top, left in starts:
                i, j = y - top, x - left
                if 0 <= i < 4 and 0 <= j < 6:
                    w = 1 + min(i, 3 - i, j, 5 - j)
                    total = total + w * red()[:, top : top + 4, left : left + 6].mean((1, 2))
                    weight += w
            np.testing.assert_allclose(flow[:, y, x], total / weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "tile", "starts"),
    [(368, 368, [0]), (436, 368, [0, 68]), (1024, 496, [0, 476, 528]), (716, 368, [0, 348]), (700, 368, [0, 332])],
)
def test_no_tile_is_run_twice_and_the_last_ends_with_the_image(size, tile, starts):
    assert tile_starts(size, tile, 20) == starts


def test_weights_are_one_at_the_border():
    np.testing.assert_array_equal(tile_weights(3, 5), [[1, 1, 1, 1, 1], [1, 2, 2, 2, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(tile=(8,)), "tile is .* give a height and a width"),
        (dict(tile=(8, 9)), "the images are 7 x 9, smaller than a tile of 8 x 9"),
        (dict(tile=(4, 5), overlap=4), "tiles of 4 x 5 can't overlap by 4 pixels"),
        (dict(num_examples=4), "num_examples is 4, but the split 'test' has 3"),
    ],
)
def test_what_does_not_fit_is_one_sentence(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        evals.check(dict(name="optical_flow", **options), Red(), config("optical_flow"), "config.evals")


def test_the_wheel_turns_through_the_six_corners():
    wheel = color_wheel()
    assert wheel.shape == (55, 3)
    corners = {0: (1, 0, 0), 15: (1, 1, 0), 21: (0, 1, 0), 25: (0, 1, 1), 36: (0, 0, 1), 49: (1, 0, 1)}
    for row, color in corners.items():
        np.testing.assert_allclose(wheel[row], color)
    np.testing.assert_allclose(wheel[[5, 54]], [(1, 1 / 3, 0), (1, 0, 1 / 6)])


def test_colors_of_known_vectors():
    """No motion is white, motion to the right red and to the left between cyan and blue; beyond the scale is darker."""
    flow = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0], [-2.0, 0.0], [4.0, 0.0], [0.0, 2.0]])[None]
    colors = flow_colors(flow, longest=2.0)[0]
    np.testing.assert_allclose(colors[:3], [(1, 1, 1), (1, 0, 0), (1, 0.5, 0.5)], atol=1e-9)
    np.testing.assert_allclose(colors[3], (0, 1 - 2 / 11, 1), atol=1e-9)
    np.testing.assert_allclose(colors[4], (0.75, 0, 0), atol=1e-9)
    np.testing.assert_allclose(colors[5], (1, 0.9, 0), atol=1e-9)  # down: 13.5 of the 15 steps from red to yellow
    np.testing.assert_allclose(flow_colors(flow), flow_colors(flow, longest=4.0))


def test_the_picture_is_drawn(tmp_path):
    path = draw_flow(Red(), {}, config("optical_flow"), tmp_path / "plots" / "flow.png", dict(tile=(4, 5), overlap=1))
    assert path.read_bytes().startswith(b"\x89PNG")
