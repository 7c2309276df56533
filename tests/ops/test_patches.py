"""Patches against published values, each other and loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.variables import normal
from xattn.config import UsageError
from xattn.ops.patches import depth_to_space, flow_patches, space_to_depth


def test_blocks_are_read_frame_row_column():
    video = jnp.arange(32.0).reshape(1, 2, 4, 4, 1)
    cells = space_to_depth(video, spatial=2, temporal=2)
    assert cells.shape == (1, 1, 2, 2, 8)
    np.testing.assert_array_equal(cells[0, 0, 0, 0], [0, 1, 4, 5, 16, 17, 20, 21])
    np.testing.assert_array_equal(cells[0, 0, 1, 0], [8, 9, 12, 13, 24, 25, 28, 29])


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 6, 4, 6, 3)])
def test_depth_to_space_is_the_inverse(shape):
    x, temporal = normal(*shape), 3 if len(shape) == 5 else 1
    cells = space_to_depth(x, spatial=2, temporal=temporal)
    # Channels vary fastest within a pixel, pixels within a row.
    np.testing.assert_array_equal(cells[(0,) * (len(shape) - 1)][:6].reshape(2, 3), x[(0,) * (len(shape) - 2)][:2])
    np.testing.assert_array_equal(depth_to_space(cells, spatial=2, temporal=temporal), x)


def test_surroundings_are_read_row_column_channel():
    frames = jnp.arange(32.0).reshape(1, 4, 4, 2)
    patches = flow_patches(frames)
    assert patches.shape == (1, 4, 4, 18)
    np.testing.assert_array_equal(patches[0, 0, 0], [0] * 8 + [0, 1, 2, 3] + [0, 0] + [8, 9, 10, 11])
    inner = np.asarray(frames[0, 1:4, 0:3]).ravel()
    np.testing.assert_array_equal(patches[0, 2, 1], inner)
    # Frames are independent.
    pair = jnp.stack([frames, 7 * frames], axis=1)
    np.testing.assert_array_equal(flow_patches(pair)[:, 1], 7 * patches)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match=r"blocks of \(4, 4\) do not divide an input of \(8, 6\)"):
        space_to_depth(jnp.zeros((1, 8, 6, 3)), spatial=4)
    with pytest.raises(UsageError, match=r"blocks of \(2, 1, 1\) do not divide an input of \(3, 8, 6\)"):
        space_to_depth(jnp.zeros((1, 3, 8, 6, 3)), temporal=2)
    with pytest.raises(UsageError, match="6 channels do not split into blocks of 4 pixels"):
        depth_to_space(jnp.zeros((1, 8, 6, 6)), spatial=2)
