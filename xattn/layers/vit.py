"""Parts of vision transformers (arXiv 2010.11929, 2012.12877): patches, the pre-norm block, stochastic depth.

    x = x + DP(drop(A(LN(x))));     x = x + DP(drop(W2 drop(gelu(W1 LN(x) + b1)) + b2))

A is multi-head self-attention with biases, gelu is exact, LayerNorm has epsilon 1e-6. Dense kernels, class tokens and
positions start as N(0, 0.02), biases as zero; convolutions as torch's, U(+-1/sqrt(fan_in)) with their biases.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from xattn.config import UsageError
from xattn.layers.convolution import CONV_AXES
from xattn.layers.cross_attention import CrossAttention, Projection
from xattn.layers.transformer import uniform
from xattn.ops.resize import bicubic_resize

INIT = nn.initializers.normal(0.02)


def layer_norm(name: str, dtype: Dtype | None = None) -> nn.LayerNorm:
    """LayerNorm with epsilon 1e-6 and its variance around the mean."""
    return nn.LayerNorm(
        epsilon=1e-6,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        dtype=dtype,
        name=name,
    )


def dense(
    features: int, name: str, axes: tuple[str, str] = ("embed", "embed_out"), dtype: Dtype | None = None
) -> Projection:
    """Linear layer, kernel [C, features] with logical `axes` and a zero bias."""
    return Projection((features,), axes, ("norm",), kernel_init=INIT, dtype=dtype, name=name)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates of `depth` layers, growing evenly from 0 to `rate`."""
    return np.linspace(0, rate, depth).tolist()


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): x / (1 - rate) with probability 1 - rate, else 0, for each example.

    The examples are the first axis of x [B, ...]; the rng collection is "dropout".
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B *rest"], *, deterministic: bool) -> Float[Array, "B *rest"]:
        return nn.Dropout(self.rate, broadcast_dims=tuple(range(1, x.ndim)))(x, deterministic=deterministic)


class Mlp(nn.Module):
    """drop(W2 drop(gelu(W1 x + b1)) + b2), [*B, N, C] to [*B, N, C] through round(mlp_ratio C)."""

    mlp_ratio: float
    dropout_rate: float = 0.0
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B N C"], *, deterministic: bool) -> Float[Array, "*B N C"]:
        drop = nn.Dropout(self.dropout_rate, deterministic=deterministic)
        width = x.shape[-1]
        x = dense(round(self.mlp_ratio * width), "fc1", ("embed", "mlp"), self.dtype)(x)
        x = drop(nn.gelu(x, approximate=False))
        return drop(dense(width, "fc2", ("mlp", "embed"), self.dtype)(x))


class Block(nn.Module):
    """Self-attention and MLP; the equations are the module's.

    Attributes:
      num_heads: heads of the attention.
      mlp_ratio: width of the MLP's hidden layer, in widths of its input.
      drop_path_rate: of both residual branches.
      dropout_rate: after the attention and in the MLP.
      attention_dropout_rate: of the attention weights.
      attention: implementation of `dot_product_attention`.
      dtype: of the computation.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    attention: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], *, deterministic: bool = True) -> Float[Array, "B N C"]:
        drop_path = DropPath(self.drop_path_rate, name="drop_path")
        attention = CrossAttention(
            self.num_heads,
            dropout_rate=self.attention_dropout_rate,
            attention=self.attention,
            kernel_init=INIT,
            dtype=self.dtype,
            name="attn",
        )
        attended = attention(layer_norm("norm1", self.dtype)(x), deterministic=deterministic)
        attended = nn.Dropout(self.dropout_rate)(attended, deterministic=deterministic)
        x = x + drop_path(attended, deterministic=deterministic)
        mlp = Mlp(self.mlp_ratio, self.dropout_rate, self.dtype, name="mlp")
        mapped = mlp(layer_norm("norm2", self.dtype)(x), deterministic=deterministic)
        return x + drop_path(mapped, deterministic=deterministic)


class PatchEmbed(nn.Module):
    """Images [B, H, W, Cin] to tokens [B, P, C], one a patch, row by row.

        linear    p x p convolution of stride p
        conv      three convolutions with relu between them: 7x7 of stride 4 to C/4, then for p = 12: 3x3 of stride 3
                  without padding to C/2 and 3x3 of stride 1 to C; for p = 16: two 3x3 of stride 2, to C/2 and to C

    Attributes:
      features: C.
      patch_size: p.
      stem: "linear" or "conv" (arXiv 2103.14899, the models with a dagger).
      dtype: of the computation.

    Raises:
      UsageError: another stem, or no "conv" stem for this patch size.
    """

    features: int
    patch_size: int
    stem: str = "linear"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "B H W Cin"]) -> Float[Array, "B P C"]:
        p, width = self.patch_size, self.features
        if self.stem == "linear":
            x = self._conv(images, "proj", width, p, p, 0)
        elif self.stem == "conv" and p in _STEMS:
            x = self._conv(images, "conv_0", width // 4, 7, 4, 3)
            (stride, padding), last = _STEMS[p]
            x = self._conv(nn.relu(x), "conv_1", width // 2, 3, stride, padding)
            x = self._conv(nn.relu(x), "conv_2", width, 3, *last)
        else:
            raise UsageError(
                f"there is no stem '{self.stem}' for patches of {p} x {p}: take 'linear', or 'conv' with patches of "
                f"{' or '.join(map(str, _STEMS))}."
            )
        return x.reshape(x.shape[0], -1, width)

    def _conv(self, x: jax.Array, name: str, features: int, size: int, stride: int, padding: int) -> jax.Array:
        init = uniform((size * size * x.shape[-1]) ** -0.5)
        return nn.Conv(
            features,
            (size, size),
            strides=stride,
            padding=padding,
            kernel_init=nn.with_logical_partitioning(init, CONV_AXES),
            bias_init=nn.with_logical_partitioning(init, ("norm",)),
            dtype=self.dtype,
            name=name,
        )(x)


_STEMS = {12: ((3, 0), (1, 1)), 16: ((2, 1), (2, 1))}
"""Patch size: stride and padding of the second and the third convolution."""


def embed_tokens(module: nn.Module, patches: Float[Array, "B P C"], suffix: str = "") -> Float[Array, "B N C"]:
    """[token | patches] + positions, with the parameters `cls_token` and `pos_embed` of the module that calls it.

    `suffix` ends the names of both parameters.
    """
    batch, count, width = patches.shape
    token_init = nn.with_logical_partitioning(INIT, (None, None, "embed"))
    position_init = nn.with_logical_partitioning(INIT, (None, "positions", "embed"))
    token: Any = module.param(f"cls_token{suffix}", token_init, (1, 1, width))
    positions: Any = module.param(f"pos_embed{suffix}", position_init, (1, 1 + count, width))
    token = jnp.broadcast_to(token, (batch, 1, width)).astype(patches.dtype)
    return jnp.concatenate([token, patches], axis=1) + positions.astype(patches.dtype)


def check_patches(image_size: int, patch_size: int) -> None:
    """Raises `UsageError` unless the patches divide a square image."""
    if image_size % patch_size:
        fitting = max(1, round(image_size / patch_size)) * patch_size
        raise UsageError(
            f"patches of {patch_size} do not divide an image of {image_size}: take a multiple, such as {fitting}."
        )


def resize_tokens(tokens: Float[Array, "B N C"], num_tokens: int) -> Float[Array, "B M C"]:
    """Tokens of a square grid resized to another (bicubic); the first, that of the class, stays as it is.

    Args:
      tokens: [B, 1 + n^2, C], or trained positions [1, 1 + n^2, C].
      num_tokens: 1 + m^2.
    """
    old, new = (math.isqrt(count - 1) for count in (tokens.shape[1], num_tokens))
    grid = tokens[:, 1:].reshape(len(tokens), old, old, -1)
    grid = bicubic_resize(grid, (new, new)).reshape(len(tokens), new * new, -1)
    return jnp.concatenate([tokens[:, :1], grid], axis=1)
