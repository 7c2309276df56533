"""Textures made of plane waves, which any affine map carries into other plane waves exactly.

    texture(p) = 127.5 + 64 sqrt(2 / K) sum_k cos(2 pi w_k . p + phase_k),      p = (x, y)

with a phase for each colour and wave vectors w_k whose directions are uniform and whose wavelengths are
log-uniform. Seen through an affine map, p = A q + b, the waves are cos(2 pi (A^T w_k) . q + (phase_k + 2 pi w_k . b)):
a texture moves without any interpolation. On a grid of pixels the sum is one product of two matrices, since
cos(u + v) = cos u cos v - sin u sin v.
"""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Texture:
    """Plane waves: `waves` float64 [K, 2] in cycles a pixel, (x, y), and `phases` float64 [C, K]."""

    waves: Float[np.ndarray, "K 2"]
    phases: Float[np.ndarray, "C K"]

    @classmethod
    def random(cls, rng: np.random.Generator, shortest: float, longest: float, num_waves: int = 32) -> "Texture":
        """A texture in three colours with wavelengths from `shortest` to `longest` pixels."""
        frequency = 1 / np.exp(rng.uniform(np.log(shortest), np.log(longest), num_waves))
        angle = rng.uniform(0, 2 * np.pi, num_waves)
        waves = frequency[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        return cls(waves, rng.uniform(0, 2 * np.pi, (3, num_waves)))

    def draw(
        self, height: int, width: int, matrix: Float[np.ndarray, "2 2"], shift: Float[np.ndarray, "2"]
    ) -> Float[np.ndarray, "H W C"]:
        """The texture in pixels: pixel q = (x, y) shows the point `matrix` q + `shift`. About -64..319; not clipped."""
        waves = self.waves @ matrix
        phases = self.phases + 2 * np.pi * self.waves @ shift
        u = 2 * np.pi * waves[:, 0] * np.arange(width)[:, None]  # [W, K]
        v = 2 * np.pi * waves[:, 1] * np.arange(height)[:, None, None] + phases  # [H, C, K]
        rows = np.concatenate([np.cos(v), -np.sin(v)], -1).astype(np.float32)
        columns = np.concatenate([np.cos(u), np.sin(u)], -1).astype(np.float32)
        image = rows.reshape(-1, columns.shape[1]) @ columns.T
        scale = 64 * np.sqrt(2 / len(self.waves))
        return 127.5 + scale * image.reshape(height, -1, width).transpose(0, 2, 1)
