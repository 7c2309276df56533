"""Structured masks: who may attend to whom, kept as small parts until a block of it is needed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool


def take(x: jax.Array, start: int | jax.Array, size: int, axis: int) -> jax.Array:
    """`x[start : start + size]` on `axis`; an axis that broadcasts (absent or of length 1) stays as it is."""
    if x.ndim < -axis or x.shape[axis] in (1, size):
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


@struct.dataclass
class Mask:
    """A conjunction of conditions on (batch, head, query i, key j). True = may attend.

    Attributes:
      q_mask: bool [*B, N], False for queries that are padding; their output is zero.
      kv_mask: bool [*B, M], False for keys that are padding.
      lower: int or int array [*B], the smallest allowed j - i.
      upper: int or int array [*B], the largest allowed j - i.
      segments: pairs (int [*B, N], int [*B, M]); query and key must carry the same number in each pair.
      dense: bool, broadcastable to [*B, H, N, M].

    `a & b` allows what both allow. `Mask()` allows everything. Offsets and arrays may be traced.
    """

    q_mask: Any = None
    kv_mask: Any = None
    lower: Any = None
    upper: Any = None
    segments: tuple = ()
    dense: Any = None

    @classmethod
    def causal(cls, offset: Any = 0) -> "Mask":
        """Query i sees keys 0 .. i + offset; with a cache of c earlier keys, offset is c."""
        return cls(upper=offset)

    @classmethod
    def window(cls, left: int | None, right: int | None, offset: Any = 0) -> "Mask":
        """Query i sees keys i + offset - left .. i + offset + right; None leaves a side open."""
        return cls(
            lower=None if left is None else offset - left,
            upper=None if right is None else offset + right,
        )

    @classmethod
    def packed(cls, q_segments: Any, kv_segments: Any) -> "Mask":
        """Several sequences packed in one row: only equal segment numbers see each other."""
        return cls(segments=((q_segments, kv_segments),))

    def __and__(self, other: "Mask") -> "Mask":
        def both(join: Callable, a: Any, b: Any) -> Any:
            return b if a is None else a if b is None else join(a, b)

        return Mask(
            q_mask=both(jnp.logical_and, self.q_mask, other.q_mask),
            kv_mask=both(jnp.logical_and, self.kv_mask, other.kv_mask),
            lower=both(jnp.maximum, self.lower, other.lower),
            upper=both(jnp.minimum, self.upper, other.upper),
            segments=self.segments + other.segments,
            dense=both(jnp.logical_and, self.dense, other.dense),
        )

    def block(self, row: Any, rows: int, column: Any, columns: int) -> Bool[Array, "..."] | None:
        """The mask of queries row .. row + rows - 1 and keys column .. column + columns - 1.

        Returns:
          A bool array broadcastable to [*B, H, rows, columns], no larger than its parts need, or
          None if all may attend.
        """
        parts = []
        if self.q_mask is not None:
            parts.append(take(self.q_mask, row, rows, -1)[..., None, :, None])
        if self.kv_mask is not None:
            parts.append(take(self.kv_mask, column, columns, -1)[..., None, None, :])
        for q_segments, kv_segments in self.segments:
            q_segments = take(q_segments, row, rows, -1)[..., None, :, None]
            parts.append(q_segments == take(kv_segments, column, columns, -1)[..., None, None, :])
        steps = (column + jnp.arange(columns)) - (row + jnp.arange(rows))[:, None]
        if self.lower is not None:
            parts.append(steps >= jnp.asarray(self.lower)[..., None, None, None])
        if self.upper is not None:
            parts.append(steps <= jnp.asarray(self.upper)[..., None, None, None])
        if self.dense is not None:
            parts.append(take(take(self.dense, row, rows, -2), column, columns, -1))
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def as_array(self, num_queries: int, num_keys: int) -> Bool[Array, "..."]:
        """The whole mask as one bool array, broadcastable to [*B, H, N, M]."""
        block = self.block(0, num_queries, 0, num_keys)
        return jnp.ones((1, 1), bool) if block is None else block
