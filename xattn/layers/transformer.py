"""Post-norm transformer layers (arXiv 1706.03762, section 3.1), equal to torch's encoder and decoder layers.

    encoder:  x = LN(x + drop(SA(x)));                             x = LN(x + drop(W2 drop(relu(W1 x + b1)) + b2))
    decoder:  x = LN(x + drop(SA(x)));  x = LN(x + drop(CA(x, m)));  x = LN(x + drop(W2 drop(relu(W1 x + b1)) + b2))

Attention weights drop at the same rate. Initialisers are torch's: attention projections Xavier-uniform over the packed
[3C, C] matrix with zero biases, output projection and Dense layers uniform in +-1/sqrt(fan_in). No positions are added.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from xattn.layers.cross_attention import CrossAttention, Projection


def uniform(bound: float) -> nn.initializers.Initializer:
    """Initialiser U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_dense(features: int, fan_in: int, axes: tuple[str, str], **kwargs) -> Projection:
    """Dense layer with torch's default initialisation, U(+-1/sqrt(fan_in)) for kernel and bias."""
    init = uniform(fan_in**-0.5)
    return Projection((features,), axes, ("norm",), kernel_init=init, bias_init=init, **kwargs)


def torch_attention(width: int, **kwargs) -> CrossAttention:
    """CrossAttention on tokens of one width with the initialisation of torch.nn.MultiheadAttention."""
    return CrossAttention(kernel_init=uniform((6 / (4 * width)) ** 0.5), out_kernel_init=uniform(width**-0.5), **kwargs)


def layer_norm(**kwargs) -> nn.LayerNorm:
    """LayerNorm with torch's epsilon of 1e-5 and its variance around the mean."""
    return nn.LayerNorm(
        epsilon=1e-5,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        **kwargs,
    )


class FeedForward(nn.Module):
    """W2 drop(relu(W1 x + b1)) + b2, [*B, N, C] to [*B, N, C]."""

    mlp_dim: int
    dropout_rate: float = 0.0
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B N C"], *, deterministic: bool = True) -> Float[Array, "*B N C"]:
        width = x.shape[-1]
        x = torch_dense(self.mlp_dim, width, ("embed", "mlp"), dtype=self.dtype, name="linear1")(x)
        x = nn.Dropout(self.dropout_rate)(nn.relu(x), deterministic=deterministic)
        return torch_dense(width, self.mlp_dim, ("mlp", "embed"), dtype=self.dtype, name="linear2")(x)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by LayerNorm: torch.nn.TransformerEncoderLayer, batch first."""

    num_heads: int
    mlp_dim: int = 2048
    dropout_rate: float = 0.1
    attention: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B N C"], *, deterministic: bool = True) -> Float[Array, "*B N C"]:
        drop = nn.Dropout(self.dropout_rate, deterministic=deterministic)
        attend: dict[str, Any] = dict(
            num_heads=self.num_heads, dropout_rate=self.dropout_rate, attention=self.attention
        )
        attention = torch_attention(x.shape[-1], **attend, dtype=self.dtype, name="self_attn")
        x = layer_norm(dtype=self.dtype, name="norm1")(x + drop(attention(x, deterministic=deterministic)))
        mapped = FeedForward(self.mlp_dim, self.dropout_rate, self.dtype, name="mlp")(x, deterministic=deterministic)
        return layer_norm(dtype=self.dtype, name="norm2")(x + drop(mapped))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to `memory`, feed-forward: torch.nn.TransformerDecoderLayer, batch first."""

    num_heads: int
    mlp_dim: int = 2048
    dropout_rate: float = 0.1
    attention: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B N C"], memory: Float[Array, "*B M C"], *, deterministic: bool = True
    ) -> Float[Array, "*B N C"]:
        drop = nn.Dropout(self.dropout_rate, deterministic=deterministic)
        attend: dict[str, Any] = dict(
            num_heads=self.num_heads, dropout_rate=self.dropout_rate, attention=self.attention
        )
        attention = torch_attention(x.shape[-1], **attend, dtype=self.dtype, name="self_attn")
        x = layer_norm(dtype=self.dtype, name="norm1")(x + drop(attention(x, deterministic=deterministic)))
        attention = torch_attention(x.shape[-1], **attend, dtype=self.dtype, name="cross_attn")
        x = layer_norm(dtype=self.dtype, name="norm2")(x + drop(attention(x, memory, deterministic=deterministic)))
        mapped = FeedForward(self.mlp_dim, self.dropout_rate, self.dtype, name="mlp")(x, deterministic=deterministic)
        return layer_norm(dtype=self.dtype, name="norm3")(x + drop(mapped))
