"""Conv-4, the small image encoder of few-shot learning (Vinyals et al., arXiv 1606.04080, section 4.1).

    stage: conv 3x3 - norm - ReLU - max-pool 2x2            image [*B, H, W, C] -> four maps, sides H/2, H/4, H/8, H/16

Deviations: GroupNorm with 8 groups by default (the paper has BatchNorm), so that the feature of an image never
depends on the images beside it; widths 32-64-64-64 (64 throughout); no bias in front of the norm.
"""

from typing import Any

from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from xattn.layers.convolution import conv, image_norm, max_pool


class Conv4(nn.Module):
    """Four convolution stages.

    Attributes:
      widths: channels after each stage.
      norm: "group", or "batch" for BatchNorm.
      num_groups: groups of GroupNorm.
      pool_last: whether the last stage halves the map too. Without it a 32x32 image gives 4x4 positions, not 2x2.
      axis_name: mapped axis over which BatchNorm averages.
      dtype: of the computation.
    """

    widths: tuple[int, ...] = (32, 64, 64, 64)
    norm: str = "group"
    num_groups: int = 8
    pool_last: bool = True
    axis_name: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "*B H W C"], *, train: bool = False) -> tuple[Float[Array, "..."], ...]:
        """Returns the feature map [*B, h, w, width] of every stage, the last one last."""
        norm: dict[str, Any] = dict(kind=self.norm, num_groups=self.num_groups, axis_name=self.axis_name)
        x, stages = images, []
        for i, width in enumerate(self.widths):
            x = conv(width, 3, dtype=self.dtype, name=f"conv_{i}")(x)
            x = nn.relu(image_norm(x, train=train, dtype=self.dtype, name=f"norm_{i}", **norm))
            if self.pool_last or i < len(self.widths) - 1:
                x = max_pool(x)
            stages.append(x)
        return tuple(stages)
