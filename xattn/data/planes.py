"""Moving planes: optical flow that is exact by construction, made as it is asked for.

An example is a textured plane under a random affine motion. With the centre c of the image, a pixel x = (x, y) moves by

    flow(x) = M (x - c) + t,      M uniform in +-max_shift / (H + W),      t uniform in +-max_shift / 2,

so that no pixel moves by more than max_shift along an axis. The frames are drawn from the plane itself,

    frame1(x) = texture(x),       frame2(y) = texture(c + (I + M)^-1 (y - c - t)),

so frame2(x + flow(x)) = frame1(x) holds up to the rounding to uint8 where x + flow(x) lies on pixels.
"""

import jax
import numpy as np

from xattn.config import UsageError
from xattn.data.checks import check_image_size, check_split
from xattn.data.episodes import SPLITS
from xattn.data.textures import Texture


class MovingPlanes:
    """Pairs of frames with their flow: frames uint8 [2, H, W, 3], flow float32 [H, W, 2], valid bool [H, W].

    Example i of a split depends on (split, i) alone. A pixel is valid if it stays inside of the image.

    Args:
      split: "train", "val" or "test".
      image_size: H and W.
      max_shift: the largest movement along an axis, in pixels.
      num_examples: how many examples an epoch has.

    Raises:
      UsageError: there is no such split, a size is not what it should be, or the movement is too large for the image.
    """

    name = "moving_planes"

    def __init__(
        self, split: str, image_size: tuple[int, int] = (64, 96), max_shift: float = 8.0, num_examples: int = 10_000
    ):
        check_split(self.name, split)
        height, width = check_image_size(self.name, image_size)
        if num_examples < 1:
            raise UsageError(f"{self.name} needs num_examples of at least 1, but got {num_examples}.")
        # Up to a quarter, I + M has a determinant of at least 1/2.
        if not 0 <= max_shift <= (height + width) / 4:
            raise UsageError(
                f"{self.name} can't move an image of {height} x {width} by {max_shift} pixels: "
                f"give a max_shift from 0 to {(height + width) / 4}."
            )
        self.split = split
        self.image_size = (height, width)
        self.max_shift = max_shift
        self.num_examples = num_examples

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]:
        """Pair number `index`; every pair is as good as another, so `seed` changes nothing."""
        del seed
        height, width = self.image_size
        rng = np.random.default_rng([SPLITS.index(self.split), index])
        texture = Texture.random(rng, shortest=4.0, longest=float(max(64, *self.image_size)))
        motion = rng.uniform(-1, 1, (2, 2)) * self.max_shift / (height + width)
        shift = rng.uniform(-1, 1, 2) * self.max_shift / 2
        centre = np.array([width - 1, height - 1]) / 2
        back = np.linalg.inv(np.eye(2) + motion)
        frames = [
            texture.draw(height, width, np.eye(2), np.zeros(2)),
            texture.draw(height, width, back, centre - back @ (centre + shift)),
        ]
        places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)
        flow = (places - centre) @ motion.T + shift
        there = places + flow
        return {
            "frames": np.rint(np.clip(np.stack(frames), 0, 255)).astype(np.uint8),
            "flow": flow.astype(np.float32),
            "valid": np.all((there >= 0) & (there <= [width - 1, height - 1]), axis=-1),
        }

    @classmethod
    def shapes(cls, image_size: tuple[int, int] = (64, 96), **_: object) -> dict[str, jax.ShapeDtypeStruct]:
        """The fields of one example."""
        return flow_shapes(*check_image_size(cls.name, image_size))


def flow_shapes(height: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The fields of an example of optical flow."""
    return {
        "frames": jax.ShapeDtypeStruct((2, height, width, 3), np.uint8),
        "flow": jax.ShapeDtypeStruct((height, width, 2), np.float32),
        "valid": jax.ShapeDtypeStruct((height, width), np.bool_),
    }
