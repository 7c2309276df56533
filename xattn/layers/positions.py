"""Position encodings of grids: Fourier features and trainable tables (arXiv 2107.14795, appendix D; 2103.03206, 3.2).

A grid of dims n_1 x .. x n_d has coordinates from -1 to 1 on each axis:

    inclusive:  -1 + 2 i / (n - 1), the last index is at 1            exclusive:  -1 + 2 i / n

Fourier features of a point p, with K bands f_k = 1 .. resolution / 2, evenly spaced on each axis a:

    [p_1 .. p_d | sin(pi f_ak p_a) for a, for k | cos(pi f_ak p_a) for a, for k]

They are separable, so each axis has a table [n_a, 1 + 2K], made in NumPy's float64 while a program is traced, and
rounded once: in float32 the argument alone would be wrong by up to 1e-2 for 30,720 audio samples. No array of the whole
grid becomes a constant of the program.

Deviations: the released code computes the features in float32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from xattn.config import UsageError
from xattn.layers.perceiver import dense


@dataclasses.dataclass(frozen=True)
class FourierPositions:
    """Fourier features; the equations are the module's.

    Attributes:
      num_bands: K.
      max_resolution: for each axis, twice its highest frequency; the grid's own dims by default.
      concat_pos: whether the coordinates come first.
      sine_only: no cosines.
      project_features: width of a linear map of the features, if there is one.
      variant: "deepmind" or "hf", for the initial values of that map.
    """

    num_bands: int
    max_resolution: tuple[int, ...] | None = None
    concat_pos: bool = True
    sine_only: bool = False
    project_features: int | None = None
    variant: str = "deepmind"

    def grid(self, index_dims: tuple[int, ...], *, grid: str = "inclusive") -> Float[Array, "P C"]:
        """Features of a whole grid, row-major."""

        def spread(axis: int, table: np.ndarray) -> jax.Array:
            shape = [1] * len(index_dims) + [table.shape[-1]]
            shape[axis] = index_dims[axis]
            return jnp.broadcast_to(table.reshape(shape), (*index_dims, table.shape[-1]))

        features = self._join([spread(*item) for item in enumerate(self._tables(index_dims, grid))])
        return features.reshape(-1, features.shape[-1])

    def at_indices(
        self, index_dims: tuple[int, ...], indices: Int[Array, " N"], *, grid: str = "inclusive"
    ) -> Float[Array, "N C"]:
        """Features of some points of a grid, given by flat row-major indices."""
        tables = self._tables(index_dims, grid)
        where = jnp.unravel_index(indices, index_dims)
        return self._join([jnp.asarray(table)[index] for table, index in zip(tables, where, strict=True)])

    def at_positions(self, index_dims: tuple[int, ...], positions: Float[Array, "*B P d"]) -> Float[Array, "*B P C"]:
        """Features of any points, computed in float32."""
        resolution = self._resolution(index_dims)
        if positions.shape[-1] != len(resolution):
            raise UsageError(
                f"positions have {positions.shape[-1]} coordinates but the input has {len(resolution)} axes: "
                "give one coordinate an axis."
            )
        points = jnp.moveaxis(positions.astype(jnp.float32), -1, 0)
        return self._join([self._axis(p, n, jnp) for p, n in zip(points, resolution, strict=True)])

    def _resolution(self, index_dims: tuple[int, ...]) -> tuple[int, ...]:
        resolution = self.max_resolution or index_dims
        if len(resolution) != len(index_dims):
            raise UsageError(
                f"max_resolution {resolution} has {len(resolution)} axes but the input has {len(index_dims)}: "
                "give one number an axis."
            )
        return resolution

    def _tables(self, index_dims: tuple[int, ...], grid: str) -> list[np.ndarray]:
        resolution = self._resolution(index_dims)
        return [
            self._axis(coordinates(n, grid), res, np).astype(np.float32)
            for n, res in zip(index_dims, resolution, strict=True)
        ]

    def _axis(self, positions: Any, resolution: int, numpy: Any) -> Any:
        """[coordinate, K sines, K cosines] of positions on one axis."""
        bands = numpy.pi * numpy.linspace(1.0, resolution / 2, self.num_bands)
        angles = positions[..., None] * bands
        return numpy.concatenate([positions[..., None], numpy.sin(angles), numpy.cos(angles)], axis=-1)

    def _join(self, axes: list[jax.Array]) -> jax.Array:
        ends = [0, 1, 1 + self.num_bands, 1 + 2 * self.num_bands]
        kept = [self.concat_pos, True, not self.sine_only]
        parts = [x[..., ends[i] : ends[i + 1]] for i in range(3) if kept[i] for x in axes]
        return jnp.concatenate(parts, axis=-1)


@dataclasses.dataclass(frozen=True)
class TrainablePositions:
    """A trained vector for each point of a grid.

    Attributes:
      features: width of the vectors.
      init_scale: standard deviation of the initial normal, which is cut at two of them ("deepmind").
      index_dims: the grid that the table is for; by default the one it is initialised with. A sequence may be shorter
        and takes the first rows; other grids must be equal.
      project_features: width of a linear map of the vectors, if there is one.
      variant: "deepmind" or "hf", for the initial values.
    """

    features: int
    init_scale: float = 0.02
    index_dims: tuple[int, ...] | None = None
    project_features: int | None = None
    variant: str = "deepmind"

    def table(self, module: nn.Module, name: str, index_dims: tuple[int, ...]) -> Float[Array, "P C"]:
        """The parameter `name` of `module` for a grid, row-major."""
        own = self.index_dims or index_dims
        fits = own == index_dims or (len(own) == len(index_dims) == 1 and index_dims[0] < own[0])
        if not fits:
            raise UsageError(
                f"the input has positions {index_dims} but {name} has {own}: "
                "cut or resize the input, or set index_dims of the positions."
            )
        normal = nn.initializers.truncated_normal if self.variant == "deepmind" else nn.initializers.normal
        init = nn.with_logical_partitioning(normal(self.init_scale), ("positions", "embed"))
        table: Any = module.param(name, init, (math.prod(own), self.features))
        return table[: math.prod(index_dims)]


PositionEncoding = FourierPositions | TrainablePositions
Rows = Callable[..., jax.Array]


def coordinates(size: int, grid: str = "inclusive") -> np.ndarray:
    """The float64 coordinates of an axis, see the module.

    Raises:
      UsageError: unknown grid.
    """
    if grid not in ("inclusive", "exclusive"):
        raise UsageError(f"query grid '{grid}' is none of inclusive, exclusive.")
    return np.linspace(-1, 1, size) if grid == "inclusive" else -1 + 2 * np.arange(size) / size


def bind(
    positions: PositionEncoding, module: nn.Module, prefix: str, index_dims: tuple[int, ...], dtype: Dtype | None = None
) -> Rows:
    """Creates an encoding's parameters, `{prefix}_embs` and `{prefix}_proj`, in the module that is running.

    Args:
      positions: the encoding.
      module: the module whose compact method calls this.
      prefix: of the parameters' names.
      index_dims: the grid.
      dtype: of the projection's computation.

    Returns:
      A function of (indices=None, grid="inclusive", pos=None) to rows: of the whole grid [P, C]; of the flat indices
      [N, C] on the grid named; or of coordinates `pos` [*B, P, d], which trainable positions take no notice of.
    """
    if isinstance(positions, TrainablePositions):
        table = positions.table(module, f"{prefix}_embs", index_dims)

        def rows(indices: Any = None, grid: str = "inclusive", pos: Any = None) -> jax.Array:
            return table if indices is None else table[indices]
    else:

        def rows(indices: Any = None, grid: str = "inclusive", pos: Any = None) -> jax.Array:
            if pos is not None:
                return positions.at_positions(index_dims, pos)
            if indices is None:
                return positions.grid(index_dims, grid=grid)
            return positions.at_indices(index_dims, indices, grid=grid)

    if positions.project_features is None:
        return rows
    project = dense(positions.project_features, variant=positions.variant, name=f"{prefix}_proj", dtype=dtype)
    project(rows(jnp.zeros(1, jnp.int32)))  # makes the parameters
    # Without its module the map can be called anywhere, also inside a scan over chunks of rows.
    unbound, variables = project.unbind()

    def project_rows(*args: Any, **kwargs: Any) -> jax.Array:
        with jax.named_scope(f"{prefix}_proj"):
            projected: Any = unbound.apply(variables, rows(*args, **kwargs))
            return projected

    return project_rows
