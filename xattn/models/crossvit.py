"""CrossViT: images as patches of several sizes, one branch each, fused by cross-attention (arXiv 2103.14899).

Branch i sees the image at S_i x S_i, cut into patches of p_i, as N_i tokens of width C_i after a class token:

    x_i = [cls_i | patches_i] + positions_i                                      i = 0 .. n-1, fine to coarse

Each of K stages runs depths[i] pre-norm blocks on every branch (`xattn.layers.vit`), z_i, and then fuses them. With
o = i + 1 mod n, the class token of branch i asks the patches of branch o, in the width of branch o:

    u_i = f_i(cls_i)                            f_i = Dense(gelu(LN(.))), C_i -> C_o
    c_i = u_i + DP(A_i(LN(t)_0, LN(t)))         t = [u_i | patches_o], A_i with the heads of branch o; no MLP
    x_i = [g_i(c_i) | patches_i]                g_i = Dense(gelu(LN(.))), C_o -> C_i

All branches read the same z, none what another has just written, and the old class token has no residual. At the end

    logits = mean_i head_i(LN_i(x_i)_0)

The other ways to fuse are the ablation of section 3.3. With f_i and g_i to and from the width of the last branch:

    none             nothing                                                     the branches meet in the logits
    all_attention    y = [f_0(x_0) | .. | f_n-1(x_n-1)];  y = y + DP(A(LN(y)));  x_i = g_i(its part of y)
    class_token      cls_i = g_i(sum_j f_j(cls_j))
    pairwise         as class_token, and patches_i = g_i(sum_j f_j(patches_j resized to the grid of i))

The images are resized to each S_i bicubically, after their normalisation, as torch does it. Weights of the fusion are
sown as `stage_{k}/fusion_{i}/attn/attention_weights` [B, H, 1, 1 + N_o].

Sources: the paper; IBM/CrossViT and timm for what it leaves open. For more than two branches the ring i -> i + 1 is
the released code's; the paper has two.

Deviations: the released code builds more than one fusion a stage (L > 1) from class tokens that no longer see patches,
so we have L = 1, as all published weights. How "pairwise" resizes and where the widths of the ablation meet is not
told; the rules above are ours. `pool="mean"` (the mean of a branch's patches in the place of its class token, in the
logits) is timm's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from xattn.config import UsageError
from xattn.layers.cross_attention import CrossAttention
from xattn.layers.vit import (
    INIT,
    Block,
    DropPath,
    PatchEmbed,
    check_patches,
    dense,
    drop_path_rates,
    embed_tokens,
    layer_norm,
    resize_tokens,
)
from xattn.ops.resize import bicubic_resize

TOKENS = ("batch", "length", "act_embed")


class Map(nn.Module):
    """Dense(gelu(LN(x))) to `features`: f and g of the paper."""

    features: int
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B N Cin"]) -> Float[Array, "B N C"]:
        # Where branches meet, gradients would else be split by the channels of the kernels that they come through.
        x = nn.with_logical_constraint(x, TOKENS)
        x = nn.gelu(layer_norm("norm", self.dtype)(x), approximate=False)
        return nn.with_logical_constraint(dense(self.features, "dense", dtype=self.dtype)(x), TOKENS)


class Attend(nn.Module):
    """x_q + DP(A(LN(x)_q, LN(x))), where x_q are the first `num_queries` tokens of x [B, N, C], or all of them."""

    num_heads: int
    num_queries: int | None = None
    drop_path_rate: float = 0.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    attention: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], *, deterministic: bool) -> Float[Array, "B Q C"]:
        normed = layer_norm("norm1", self.dtype)(x)
        attended = CrossAttention(
            self.num_heads,
            dropout_rate=self.attention_dropout_rate,
            attention=self.attention,
            kernel_init=INIT,
            dtype=self.dtype,
            name="attn",
        )(normed[:, : self.num_queries], normed, deterministic=deterministic)
        attended = nn.Dropout(self.dropout_rate)(attended, deterministic=deterministic)
        return x[:, : self.num_queries] + DropPath(self.drop_path_rate)(attended, deterministic=deterministic)


class Branch(nn.Module):
    """The blocks of one branch in a stage, tokens [B, N, C] to tokens."""

    depth: int
    num_heads: int
    mlp_ratio: float
    rates: tuple[float, ...]
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    attention: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], deterministic: bool) -> Float[Array, "B N C"]:
        for j in range(self.depth):
            x = Block(
                self.num_heads,
                mlp_ratio=self.mlp_ratio,
                drop_path_rate=self.rates[j],
                dropout_rate=self.dropout_rate,
                attention_dropout_rate=self.attention_dropout_rate,
                attention=self.attention,
                dtype=self.dtype,
                name=f"block_{j}",
            )(x, deterministic=deterministic)
        return x


class Stage(nn.Module):
    """Blocks on every branch, then their fusion; the equations are the module's.

    Attributes:
      fusion: a key of `FUSIONS`.
      depths, num_heads, mlp_ratio: of the branches' blocks, the first two one a branch.
      rates: drop-path rates of the deepest branch's blocks; other branches take the first of them, the fusion the last.
      dropout_rate, attention_dropout_rate, attention, dtype: see `CrossViT`.
    """

    fusion: str
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float
    rates: tuple[float, ...]
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    attention: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, branches: list[Float[Array, "B _ _"]], *, deterministic: bool) -> list[Float[Array, "B _ _"]]:
        common: dict[str, Any] = dict(
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            attention=self.attention,
            dtype=self.dtype,
        )
        branches = [
            Branch(depth, heads, self.mlp_ratio, self.rates, **common, name=f"branch_{i}")(x, deterministic)
            for i, (x, depth, heads) in enumerate(zip(branches, self.depths, self.num_heads, strict=True))
        ]

        return FUSIONS[self.fusion](self, branches, deterministic)

    def attend(self, name: str, branch: int, num_queries: int | None = None) -> Attend:
        """The attention `name`, with the heads of a branch."""
        return Attend(
            self.num_heads[branch],
            num_queries=num_queries,
            drop_path_rate=self.rates[-1],
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            attention=self.attention,
            dtype=self.dtype,
            name=name,
        )

    def maps(self, kind: str, widths: list[int]) -> list[Map]:
        """The maps proj_i or revert_i of all branches to `widths`."""
        return [Map(width, self.dtype, name=f"{kind}_{i}") for i, width in enumerate(widths)]


# A fusion takes the stage that runs it, which makes its parts, and the branches [B, 1 + N_i, C_i].


def _none(stage: Stage, branches: list, deterministic: bool) -> list:
    del stage, deterministic
    return branches


def _cross_attention(stage: Stage, branches: list, deterministic: bool) -> list:
    count = len(branches)
    others = [(i + 1) % count for i in range(count)]
    to_other = stage.maps("proj", [branches[o].shape[-1] for o in others])
    back = stage.maps("revert", [x.shape[-1] for x in branches])
    fused = []
    for i, (x, o) in enumerate(zip(branches, others, strict=True)):
        tokens = jnp.concatenate([to_other[i](x[:, :1]), branches[o][:, 1:]], axis=1)
        token = stage.attend(f"fusion_{i}", o, num_queries=1)(tokens, deterministic=deterministic)
        fused.append(jnp.concatenate([back[i](token), x[:, 1:]], axis=1))
    return fused


def _all_attention(stage: Stage, branches: list, deterministic: bool) -> list:
    to_common, back = _common(stage, branches)
    tokens = jnp.concatenate([f(x) for f, x in zip(to_common, branches, strict=True)], axis=1)
    tokens = stage.attend("fusion", -1)(tokens, deterministic=deterministic)
    ends = [sum(x.shape[1] for x in branches[: i + 1]) for i in range(len(branches) - 1)]
    return [g(part) for g, part in zip(back, jnp.split(tokens, ends, axis=1), strict=True)]


def _class_token(stage: Stage, branches: list, deterministic: bool) -> list:
    del deterministic
    to_common, back = _common(stage, branches)
    total = jnp.stack([f(x[:, :1]) for f, x in zip(to_common, branches, strict=True)]).sum(0)
    return [jnp.concatenate([g(total), x[:, 1:]], axis=1) for g, x in zip(back, branches, strict=True)]


def _pairwise(stage: Stage, branches: list, deterministic: bool) -> list:
    del deterministic
    to_common, back = _common(stage, branches)
    mapped = [f(x) for f, x in zip(to_common, branches, strict=True)]
    return [back[i](jnp.stack([resize_tokens(y, x.shape[1]) for y in mapped]).sum(0)) for i, x in enumerate(branches)]


def _common(stage: Stage, branches: list) -> tuple[list[Map], list[Map]]:
    """The maps to the width of the last branch, and back."""
    widths = [x.shape[-1] for x in branches]
    return stage.maps("proj", [widths[-1]] * len(widths)), stage.maps("revert", widths)


FUSIONS = {
    "all_attention": _all_attention,
    "class_token": _class_token,
    "cross_attention": _cross_attention,
    "none": _none,
    "pairwise": _pairwise,
}


_BRANCH_FIELDS = ("image_sizes", "patch_sizes", "features", "num_heads", "depths")


class CrossViT(nn.Module):
    """CrossViT, a classifier of images cut into patches of several sizes; the equations are the module's.

    Fields that are tuples have one entry a branch. Each parameter of a branch i is named `..._{i}`.

    Attributes:
      num_classes: K; 0 for no heads: the normalised class tokens of all branches, [B, sum C_i], come out.
      image_sizes, patch_sizes: S_i and p_i, which must divide it.
      features: C_i.
      num_heads: heads of the branch's blocks, and of the fusion that reads this branch.
      depths: blocks of a branch in each stage.
      num_stages: K of the paper.
      mlp_ratio: of the blocks.
      stem: "linear", or "conv" for the models with a dagger; see `xattn.layers.vit.PatchEmbed`.
      fusion: a key of `FUSIONS`.
      pool: "token", or "mean" for the mean of a branch's patches.
      drop_path_rate: of the last block; rates grow evenly from 0 over the blocks of the deepest branch.
      dropout_rate: after positions, attentions and in MLPs.
      attention_dropout_rate: of attention weights.
      head_dropout_rate: before the heads.
      attention: implementation of `dot_product_attention`.
      dtype: of the computation.

    Raises:
      UsageError: fields that don't fit each other or the patches.
    """

    num_classes: int = 1000
    image_sizes: tuple[int, ...] = (240, 224)
    patch_sizes: tuple[int, ...] = (12, 16)
    features: tuple[int, ...] = (192, 384)
    num_heads: tuple[int, ...] = (6, 6)
    depths: tuple[int, ...] = (1, 4)
    num_stages: int = 3
    mlp_ratio: float = 4.0
    stem: str = "linear"
    fusion: str = "cross_attention"
    pool: str = "token"
    drop_path_rate: float = 0.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    head_dropout_rate: float = 0.0
    attention: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "B H W Cin"], *, train: bool = False) -> Float[Array, "B K"]:
        """Logits of normalised images [B, H, W, Cin], float32; any height and width."""
        self._check()
        drop = nn.Dropout(self.dropout_rate, deterministic=not train)
        branches = [drop(self._tokens(i, images)) for i in range(len(self.features))]
        depth = max(self.depths)
        rates = drop_path_rates(self.drop_path_rate, self.num_stages * depth)
        for k in range(self.num_stages):
            branches = Stage(
                fusion=self.fusion,
                depths=self.depths,
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                rates=tuple(rates[k * depth : (k + 1) * depth]),
                dropout_rate=self.dropout_rate,
                attention_dropout_rate=self.attention_dropout_rate,
                attention=self.attention,
                dtype=self.dtype,
                name=f"stage_{k}",
            )(branches, deterministic=not train)
        normed = [layer_norm(f"norm_{i}", self.dtype)(x) for i, x in enumerate(branches)]
        pooled = [x[:, 0] if self.pool == "token" else x[:, 1:].mean(1) for x in normed]
        pooled = [nn.with_logical_constraint(x, ("batch", "act_embed")) for x in pooled]
        if not self.num_classes:
            return jnp.concatenate(pooled, axis=-1).astype(jnp.float32)
        drop = nn.Dropout(self.head_dropout_rate, deterministic=not train)
        logits = [
            dense(self.num_classes, f"head_{i}", ("embed", "classes"), self.dtype)(drop(x))
            for i, x in enumerate(pooled)
        ]
        return jnp.stack(logits).astype(jnp.float32).mean(0)

    def _tokens(self, i: int, images: jax.Array) -> jax.Array:
        """Class token and patches of branch i with their positions."""
        width, size = self.features[i], self.image_sizes[i]
        embed = PatchEmbed(width, self.patch_sizes[i], self.stem, self.dtype, name=f"patch_embed_{i}")
        return embed_tokens(self, embed(bicubic_resize(images, (size, size))), f"_{i}")

    def _check(self) -> None:
        fields = {name: getattr(self, name) for name in _BRANCH_FIELDS}
        if len(set(map(len, fields.values()))) > 1 or len(self.features) < 2:
            given = ", ".join(f"{name} {tuple(values)}" for name, values in fields.items())
            raise UsageError(f"CrossViT needs one entry a branch and two branches or more, but got {given}.")
        for size, patch in zip(self.image_sizes, self.patch_sizes, strict=True):
            check_patches(size, patch)
        if min(self.depths) < 0 or not max(self.depths):
            raise UsageError(f"depths {tuple(self.depths)} leave no block: give one branch at least one.")
        if self.fusion not in FUSIONS:
            raise UsageError(f"fusion '{self.fusion}' is none of {', '.join(FUSIONS)}.")
        if self.pool not in ("token", "mean"):
            raise UsageError(f"pool '{self.pool}' is none of token, mean.")


def _variant(
    features: tuple[int, int],
    num_heads: int,
    depth: int,
    mlp_ratio: float,
    image_sizes: tuple[int, int] = (240, 224),
    stem: str = "linear",
) -> dict[str, Any]:
    return dict(
        features=features,
        num_heads=(num_heads, num_heads),
        depths=(1, depth),
        mlp_ratio=mlp_ratio,
        image_sizes=image_sizes,
        stem=stem,
    )


# By timm's names, whose number is the size of the input; the paper counts the coarse branch's: 224, 384 and 480.
VARIANTS = {
    "tiny_240": _variant((96, 192), 3, 4, 4.0),
    "small_240": _variant((192, 384), 6, 4, 4.0),
    "base_240": _variant((384, 768), 12, 4, 4.0),
    "9_240": _variant((128, 256), 4, 3, 3.0),
    "15_240": _variant((192, 384), 6, 5, 3.0),
    "18_240": _variant((224, 448), 7, 6, 3.0),
    "9_dagger_240": _variant((128, 256), 4, 3, 3.0, stem="conv"),
    "15_dagger_240": _variant((192, 384), 6, 5, 3.0, stem="conv"),
    "18_dagger_240": _variant((224, 448), 7, 6, 3.0, stem="conv"),
    "15_dagger_408": _variant((192, 384), 6, 5, 3.0, (408, 384), "conv"),
    "18_dagger_408": _variant((224, 448), 7, 6, 3.0, (408, 384), "conv"),
    # In the paper only, and its size 504 follows from the FLOPs printed there.
    "18_dagger_504": _variant((224, 448), 7, 6, 3.0, (504, 480), "conv"),
}
"""The published models: name to keywords of `CrossViT`."""
