"""Fourier features against their definition in float64, grids, tables, and what becomes a constant of the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.variables import normal, random_variables
from xattn.config import UsageError
from xattn.layers.positions import FourierPositions, TrainablePositions, bind, coordinates


def definition(points, num_bands, resolution, concat_pos=True, sine_only=False):
    """Features of float64 points [P, d], band by band."""
    parts = [points] if concat_pos else []
    for function in (np.sin,) if sine_only else (np.sin, np.cos):
        for axis, res in enumerate(resolution):
            bands = [1 + (res / 2 - 1) * k / (num_bands - 1) for k in range(num_bands)]
            parts += [function(np.pi * band * points[:, axis])[:, None] for band in bands]
    return np.concatenate(parts, axis=-1)


def test_the_published_row():
    rows = FourierPositions(2, (4, 8)).grid((2, 3))
    np.testing.assert_allclose(rows[1], [-1, 0, 0, 0, 0, 0, -1, 1, 1, 1], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"concat_pos": False}, {"sine_only": True}])
@pytest.mark.parametrize(("dims", "resolution"), [((7,), None), ((3, 4), (64, 32)), ((2, 3, 4), (8, 16, 32))])
def test_grids_equal_the_definition(dims, resolution, options):
    positions = FourierPositions(5, resolution, **options)
    for grid in ("inclusive", "exclusive"):
        axes = [coordinates(n, grid) for n in dims]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(dims))
        wanted = definition(points, 5, resolution or dims, **options)
        width = 5 * len(dims) * (1 if "sine_only" in options else 2) + len(dims) * ("concat_pos" not in options)
        rows = positions.grid(dims, grid=grid)
        assert rows.shape == (np.prod(dims), width) and rows.dtype == jnp.float32
        np.testing.assert_allclose(rows, wanted, atol=1e-7)
        some = jnp.array([3, 0, 5, 3])
        got = jax.jit(lambda i, grid=grid: positions.at_indices(dims, i, grid=grid))(some)
        np.testing.assert_array_equal(got, rows[some])
        given = positions.at_positions(dims, jnp.asarray(points, jnp.float32)[None])
        np.testing.assert_allclose(given[0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("dims", "num_bands", "resolution", "width"),
    [((1920,), 192, (30720,), 385), ((368, 496), 64, (368, 496), 258), ((16, 56, 56), 32, (16, 56, 56), 195)],
)
def test_published_sizes_are_exact_to_float32(dims, num_bands, resolution, width):
    positions = FourierPositions(num_bands, resolution)
    indices = np.random.default_rng(0).integers(np.prod(dims), size=50)
    rows = positions.at_indices(dims, jnp.asarray(indices))
    assert rows.shape == (50, width)
    where = np.unravel_index(indices, dims)
    points = np.stack([coordinates(n)[i] for n, i in zip(dims, where, strict=True)], -1)
    np.testing.assert_allclose(rows, definition(points, num_bands, resolution), atol=6e-8)


def test_the_two_grids():
    np.testing.assert_allclose(coordinates(4), [-1, -1 / 3, 1 / 3, 1])
    np.testing.assert_allclose(coordinates(4, "exclusive"), [-1, -0.5, 0, 0.5])
    with pytest.raises(UsageError, match="query grid 'half' is none of inclusive, exclusive"):
        coordinates(4, "half")


def test_no_grid_becomes_a_constant():
    positions = FourierPositions(64, (368, 496))
    for function in (lambda: positions.grid((368, 496)), lambda: positions.at_indices((368, 496), jnp.arange(9))):
        text = jax.jit(function).lower().as_text()
        assert (
            len(text) < 10 * 4 * (368 + 496) * 129
        )  # the tables as hexadecimal digits; the grid has 47 million values


class Host(nn.Module):
    """A module that returns rows of an encoding."""

    positions: FourierPositions | TrainablePositions
    index_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, indices=None):
        return bind(self.positions, self, "pos", self.index_dims)(indices)


def test_tables_are_sliced_gathered_and_projected():
    host = Host(TrainablePositions(3, index_dims=(6,), project_features=4), (6,))
    variables = random_variables(host)
    params = variables["params"]
    assert {name: jax.tree.map(jnp.shape, leaf) for name, leaf in params.items()} == {
        "pos_embs": (6, 3),
        "pos_proj": {"kernel": (3, 4), "bias": (4,)},
    }
    whole = params["pos_embs"] @ params["pos_proj"]["kernel"] + params["pos_proj"]["bias"]
    np.testing.assert_allclose(host.apply(variables), whole, atol=1e-6)
    np.testing.assert_allclose(host.apply(variables, jnp.array([4, 1])), whole[jnp.array([4, 1])], atol=1e-6)
    shorter = Host(host.positions, (4,))
    np.testing.assert_allclose(shorter.apply(variables), whole[:4], atol=1e-6)


def test_initial_values():
    host = Host(TrainablePositions(64, init_scale=0.02, project_features=300), (500,))
    params = nn.unbox(host.init(jax.random.key(0)))["params"]
    # A normal cut at two standard deviations has 0.8796 of its standard deviation.
    for values, scale in ((params["pos_embs"], 0.02), (params["pos_proj"]["kernel"], 64**-0.5)):
        assert 1.99 * scale < jnp.abs(values).max() <= 2 * scale
        np.testing.assert_allclose(values.std(), 0.8796 * scale, rtol=0.02)
    assert not params["pos_proj"]["bias"].any()
    host = Host(TrainablePositions(64, init_scale=0.02, project_features=300, variant="hf"), (500,))
    for values in jax.tree.leaves(nn.unbox(host.init(jax.random.key(0)))["params"]):
        if values.any():
            np.testing.assert_allclose(values.std(), 0.02, rtol=0.02)
            assert jnp.abs(values).max() > 0.06


def test_what_does_not_fit_is_named():
    with pytest.raises(UsageError, match=r"max_resolution \(8,\) has 1 axes but the input has 2"):
        FourierPositions(2, (8,)).grid((2, 3))
    with pytest.raises(UsageError, match="positions have 1 coordinates but the input has 2 axes"):
        FourierPositions(2, (8, 8)).at_positions((2, 3), normal(1, 6, 1))
    with pytest.raises(UsageError, match=r"the input has positions \(7,\) but pos_embs has \(6,\)"):
        Host(TrainablePositions(3, index_dims=(6,)), (7,)).init(jax.random.key(0))
    with pytest.raises(UsageError, match=r"the input has positions \(2, 2\) but pos_embs has \(2, 3\)"):
        Host(TrainablePositions(3, index_dims=(2, 3)), (2, 2)).init(jax.random.key(0))
