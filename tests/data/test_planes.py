import jaxtyping
import numpy as np
import pytest
from scipy import ndimage

from xattn.config import UsageError
from xattn.data.planes import MovingPlanes
from xattn.data.textures import Texture


def warp_back(frame, flow):
    """frame(x + flow(x)), by a spline through the pixels."""
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width]
    places = np.stack([y + flow[..., 1], x + flow[..., 0]])
    channels = [ndimage.map_coordinates(frame[..., c].astype(float), places, order=5, mode="mirror") for c in range(3)]
    return np.stack(channels, -1)


@pytest.mark.parametrize("index", range(4))
def test_the_second_frame_warped_back_by_the_flow_is_the_first(index):
    example = MovingPlanes("test", (48, 72), max_shift=6.0).example(index, None)
    first, second = example["frames"].astype(float)
    inner = ndimage.binary_erosion(example["valid"], iterations=4)

    def error(flow):
        return np.abs(warp_back(second, flow) - first)[inner].mean()

    right = error(example["flow"])
    # A rounded level, and the spline's error at waves of 4 pixels; anything else is off by tens of levels.
    assert right < 4
    for wrong in (-example["flow"], example["flow"][..., ::-1], 0 * example["flow"], 1.2 * example["flow"]):
        assert error(wrong) > 3 * right


def test_whole_pixels_of_shift_move_the_texture_exactly():
    texture = Texture.random(np.random.default_rng(0), 4.0, 32.0)
    still = texture.draw(20, 30, np.eye(2), np.zeros(2))
    moved = texture.draw(20, 30, np.eye(2), np.array([3.0, -2.0]))
    np.testing.assert_allclose(moved[2:, :-3], still[:-2, 3:], atol=1e-2)


def test_a_texture_is_the_sum_of_its_waves():
    texture = Texture.random(np.random.default_rng(1), 4.0, 32.0, num_waves=5)
    matrix, shift = np.array([[0.9, 0.2], [-0.1, 1.1]]), np.array([1.5, -4.0])
    image = texture.draw(6, 7, matrix, shift)
    for y, x, channel in ((0, 0, 0), (5, 6, 2), (3, 1, 1)):
        place = matrix @ [x, y] + shift
        waves = np.cos(2 * np.pi * texture.waves @ place + texture.phases[channel])
        np.testing.assert_allclose(image[y, x, channel], 127.5 + 64 * np.sqrt(2 / 5) * waves.sum(), atol=1e-2)
    lengths = 1 / np.linalg.norm(Texture.random(np.random.default_rng(2), 4.0, 32.0, 2000).waves, axis=1)
    assert 4 <= lengths.min() < 4.1 and 31 < lengths.max() <= 32 and abs(np.log2(lengths).mean() - 3.5) < 0.1


def test_the_flow_is_affine_bounded_and_valid_where_it_stays_inside():
    source = MovingPlanes("train", (20, 30), max_shift=5.0, num_examples=40)
    largest = 0
    for index in range(40):
        example = source.example(index, 3)
        flow = example["flow"].astype(float)
        largest = max(largest, np.abs(flow).max())
        assert np.abs(np.diff(flow, 2, axis=0)).max() < 1e-5 and np.abs(np.diff(flow, 2, axis=1)).max() < 1e-5
        y, x = np.mgrid[:20, :30]
        there = np.stack([x, y], -1) + flow
        inside = (there[..., 0] >= 0) & (there[..., 0] <= 29) & (there[..., 1] >= 0) & (there[..., 1] <= 19)
        assert (example["valid"] == inside).mean() > 0.999
    assert 3.5 < largest <= 5


def test_examples_depend_on_split_and_index_alone():
    def frames(split, index, seed=None):
        return MovingPlanes(split, (16, 24), 4.0).example(index, seed)["frames"]

    np.testing.assert_array_equal(frames("train", 3), frames("train", 3, seed=9))
    different = [frames(split, index).tobytes() for split in ("train", "val", "test") for index in range(3)]
    assert len(set(different)) == 9


@pytest.mark.parametrize("image_size", [32, (32,), (32, 32, 3), (32, 0), (32, 1.5)])
def test_an_image_size_that_is_no_pair_is_named(image_size, monkeypatch):
    # Without the checked annotations of tests, as users run it.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for make in (lambda: MovingPlanes("train", image_size), lambda: MovingPlanes.shapes(image_size)):
        with pytest.raises(UsageError) as error:
            make()
        assert str(error.value) == (
            f"moving_planes needs the height and the width of images as image_size, but got {image_size}: "
            "give two whole numbers of at least 1, such as (64, 96)."
        )


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"split": "dev"}, "moving_planes has no split 'dev': choose one of train, val, test."),
        ({"num_examples": 0}, "moving_planes needs num_examples of at least 1, but got 0."),
        (
            {"image_size": (16, 24), "max_shift": 11.0},
            "moving_planes can't move an image of 16 x 24 by 11.0 pixels: give a max_shift from 0 to 10.0.",
        ),
    ],
)
def test_mistakes_are_named(options, sentence):
    with pytest.raises(UsageError) as error:
        MovingPlanes(**{"split": "train"} | options)
    assert str(error.value) == sentence
