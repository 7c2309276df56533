"""The vision transformer (arXiv 2010.11929) as trained by DeiT (2012.12877): one branch of CrossViT.

    x = [cls | patches] + positions [1 + P, C];   depth times: x = block(x);   logits = head(LN(x)_0)

Blocks and patches are those of `xattn.layers.vit`. Sources: the papers; timm for names and sizes.

Deviations: no distillation token. `stem="conv"` is CrossViT's (arXiv 2103.14899), whose baselines are `deit_9` and so
on: its coarse branch alone, K M blocks deep.
"""

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from xattn.config import UsageError
from xattn.layers.vit import Block, PatchEmbed, check_patches, dense, drop_path_rates, embed_tokens, layer_norm


class VisionTransformer(nn.Module):
    """ViT and DeiT, classifiers of images cut into patches; the equations are the module's.

    Attributes:
      num_classes: K; 0 for no head: the normalised class token [B, C] comes out.
      image_size, patch_size: side of the square images and of their patches, which must divide it.
      features: C.
      depth, num_heads, mlp_ratio: of the blocks.
      stem: "linear" or "conv", see `xattn.layers.vit.PatchEmbed`.
      pool: "token", or "mean" for the mean of the patches.
      drop_path_rate: of the last block; rates grow evenly from 0.
      dropout_rate: after positions, attentions and in MLPs.
      attention_dropout_rate: of attention weights.
      head_dropout_rate: before the head.
      attention: implementation of `dot_product_attention`.
      dtype: of the computation.

    Raises:
      UsageError: fields that don't fit each other, or images of another size.
    """

    num_classes: int = 1000
    image_size: int = 224
    patch_size: int = 16
    features: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    stem: str = "linear"
    pool: str = "token"
    drop_path_rate: float = 0.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    head_dropout_rate: float = 0.0
    attention: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "B H W Cin"], *, train: bool = False) -> Float[Array, "B K"]:
        """Logits of normalised images [B, image_size, image_size, Cin], float32."""
        check_patches(self.image_size, self.patch_size)
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise UsageError(
                f"the images are {images.shape[1]} x {images.shape[2]} but image_size is {self.image_size}: "
                "set config.data.image_size or config.model.image_size."
            )
        if self.pool not in ("token", "mean"):
            raise UsageError(f"pool '{self.pool}' is none of token, mean.")
        patches = PatchEmbed(self.features, self.patch_size, self.stem, self.dtype, name="patch_embed")(images)
        x = nn.Dropout(self.dropout_rate)(embed_tokens(self, patches), deterministic=not train)
        for j, rate in enumerate(drop_path_rates(self.drop_path_rate, self.depth)):
            x = Block(
                self.num_heads,
                mlp_ratio=self.mlp_ratio,
                drop_path_rate=rate,
                dropout_rate=self.dropout_rate,
                attention_dropout_rate=self.attention_dropout_rate,
                attention=self.attention,
                dtype=self.dtype,
                name=f"block_{j}",
            )(x, deterministic=not train)
        x = layer_norm("norm", self.dtype)(x)
        pooled = x[:, 0] if self.pool == "token" else x[:, 1:].mean(1)
        if not self.num_classes:
            return pooled.astype(jnp.float32)
        pooled = nn.Dropout(self.head_dropout_rate)(pooled, deterministic=not train)
        logits = dense(self.num_classes, "head", ("embed", "classes"), self.dtype)(pooled)
        return logits.astype(jnp.float32)


def _deit(features: int, num_heads: int, depth: int = 12, mlp_ratio: float = 4.0, stem: str = "linear") -> dict:
    return dict(features=features, num_heads=num_heads, depth=depth, mlp_ratio=mlp_ratio, stem=stem)


VARIANTS = {
    "deit_tiny_patch16_224": _deit(192, 3),
    "deit_small_patch16_224": _deit(384, 6),
    "deit_base_patch16_224": _deit(768, 12),
    "deit_base_patch16_384": _deit(768, 12) | dict(image_size=384),
    "vit_tiny_patch16_224": _deit(192, 3),
    "vit_small_patch16_224": _deit(384, 6),
    "vit_base_patch16_224": _deit(768, 12),
    # CrossViT's baselines, table 2 of arXiv 2103.14899.
    "deit_9": _deit(256, 4, 9, 3.0),
    "deit_15": _deit(384, 6, 15, 3.0),
    "deit_18": _deit(448, 7, 18, 3.0),
    "deit_9_dagger": _deit(256, 4, 9, 3.0, "conv"),
    "deit_15_dagger": _deit(384, 6, 15, 3.0, "conv"),
    "deit_18_dagger": _deit(448, 7, 18, 3.0, "conv"),
}
"""The published models: timm's name, or the paper's, to keywords of `VisionTransformer`."""
