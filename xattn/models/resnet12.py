"""ResNet-12, the image encoder of MetaOptNet (arXiv 1904.03758, section 4.1), DeepEMD and QSFormer.

    stage: LReLU(norm(conv3(LReLU(norm(conv3(LReLU(norm(conv3(x)))))))) + norm(conv1(x))), then max-pool 2x2

with LeakyReLU slope 0.1 and convolutions without bias. 84x84 images give maps of 42, 21, 10 and 5 positions a side;
12,424,320 parameters. Weights as in torch's Kaiming normal with fan_out.

Deviations: no DropBlock (QSFormer's code turns it off as well). Only the sum goes through the last LeakyReLU, as in all
released code.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from xattn.layers.convolution import conv, image_norm, in_groups, max_pool


class ResNet12(nn.Module):
    """Four residual stages.

    Attributes:
      widths: channels after each stage.
      norm: "batch", or "group" for GroupNorm.
      num_groups: groups of GroupNorm.
      pool_last: whether the last stage halves the map too. Without it a 32x32 image gives 4x4 positions, not 2x2.
      axis_name: mapped axis over which BatchNorm averages.
      dtype: of the computation.
    """

    widths: tuple[int, ...] = (64, 160, 320, 640)
    norm: str = "batch"
    num_groups: int = 8
    pool_last: bool = True
    axis_name: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "*B H W C"], *, train: bool = False) -> tuple[Float[Array, "..."], ...]:
        """Returns the feature map [*B, h, w, width] of every stage, the last one last."""
        norm = dict(kind=self.norm, num_groups=self.num_groups, axis_name=self.axis_name)
        stages = [ResidualStage(width, norm, self.dtype, name=f"stage_{i}") for i, width in enumerate(self.widths)]

        def encode(x: Any) -> tuple[Any, ...]:
            maps = []
            for i, stage in enumerate(stages):
                x = stage(x, train)
                if self.pool_last or i < len(stages) - 1:
                    x = max_pool(x)
                maps.append(x)
            return tuple(maps)

        # In training, BatchNorm makes an image's features depend on all others. What is looked at stays in one piece.
        whole = train or self.is_initializing() or self.is_mutable_collection("intermediates")
        return encode(images) if whole else in_groups(encode, images, self.widths[0])


class ResidualStage(nn.Module):
    """Three normalised convolutions beside a normalised 1x1 convolution; see the module's equation."""

    width: int
    norm: Mapping[str, Any]
    dtype: Dtype | None

    @nn.compact
    def __call__(self, x: Float[Array, "*B H W C"], train: bool) -> Float[Array, "*B H W D"]:
        def conv_norm(x, size, suffix):
            x = conv(self.width, size, dtype=self.dtype, name=f"conv_{suffix}")(x)
            return image_norm(x, train=train, dtype=self.dtype, name=f"norm_{suffix}", **self.norm)

        shortcut = conv_norm(x, 1, "shortcut")
        for i in range(3):
            x = conv_norm(x if i == 0 else nn.leaky_relu(x, 0.1), 3, i)
        return nn.leaky_relu(x + shortcut, 0.1)
