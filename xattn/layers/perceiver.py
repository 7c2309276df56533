"""Pre-norm attention layers of the Perceiver family (arXiv 2107.14795, section 3.1; released DeepMind code).

    self-attend:   n = LN(x);  x = x + drop(A(n, n));               x = x + drop(W2 gelu(W1 LN(x) + b1) + b2)
    cross-attend:  x = q + drop(A(LN_q(q), LN_kv(kv)));             x = x + drop(W2 gelu(W1 LN(x) + b1) + b2)

A is multi-head attention with biases. Without `use_query_residual`, a cross-attend has x = drop(A(...)) first.
LayerNorm has epsilon 1e-5. What is added to x is computed in `dtype`; x itself keeps the dtype in which it comes.

Two published programs run the same weights differently. `variant` tells which one a layer equals:

                             "deepmind" (released code)                 "hf" (transformers' port)
    gelu                     tanh approximation                         exact
    dropout                  after the attention and after W2           on the attention weights
    keys that are padding    no weight; all of them: zeros, so that     -3.4e38 is added to their scores; all of them:
                             the bias of A's output projection is left  the mean of the values
    padded queries           as if all keys were padding                as any other query
    kernels at the start     truncated normals by fan-in                N(0, 0.02)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from xattn.config import UsageError
from xattn.layers.cross_attention import CrossAttention, Projection
from xattn.layers.transformer import layer_norm


def fan_in_normal(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Initialiser N(0, 1 / fan_in) cut at two standard deviations and not rescaled.

    Its standard deviation is 0.88 / sqrt(fan_in). All axes but the last count as inputs. Haiku's default for Linear and
    convolutions.
    """
    return nn.initializers.truncated_normal(math.prod(shape[:-1]) ** -0.5)(key, shape, dtype)


def initialiser(variant: str, init: nn.initializers.Initializer) -> nn.initializers.Initializer:
    """`init`, or N(0, 0.02) for the "hf" variant.

    Raises:
      UsageError: unknown variant.
    """
    if variant not in ("deepmind", "hf"):
        raise UsageError(f"variant '{variant}' is none of deepmind, hf.")
    return init if variant == "deepmind" else nn.initializers.normal(0.02)


def dense(
    features: int,
    *,
    variant: str,
    name: str | None,
    init: nn.initializers.Initializer = fan_in_normal,
    axes: tuple[str, str] = ("embed", "embed_out"),
    dtype: Dtype | None = None,
) -> Projection:
    """Linear layer, kernel [C, features] with logical `axes` and a zero bias."""
    return Projection((features,), axes, ("norm",), kernel_init=initialiser(variant, init), dtype=dtype, name=name)


class Mlp(nn.Module):
    """drop(W2 gelu(W1 x + b1) + b2), [*B, N, C] to [*B, N, C] through `widening_factor` C."""

    widening_factor: int = 1
    dropout_rate: float = 0.0
    variant: str = "deepmind"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B N C"], *, deterministic: bool = True) -> Float[Array, "*B N C"]:
        width = x.shape[-1]
        lecun = nn.initializers.lecun_normal()
        common: dict[str, Any] = dict(variant=self.variant, init=lecun, dtype=self.dtype)
        x = dense(self.widening_factor * width, axes=("embed", "mlp"), name="dense1", **common)(x)
        x = nn.gelu(x, approximate=self.variant == "deepmind")
        x = dense(width, axes=("mlp", "embed"), name="dense2", **common)(x)
        return _drop(self, x, deterministic)


class SelfAttend(nn.Module):
    """Self-attention and MLP; the equations are the module's.

    Attributes:
      num_heads: heads of the attention.
      qk_features, v_features: widths of all queries and of all values together, see `CrossAttention`.
      widening_factor: of the MLP's hidden layer.
      dropout_rate: where it applies depends on `variant`.
      variant: "deepmind" or "hf", see the module.
      attention: implementation of `dot_product_attention`.
      dtype: of the computation.
    """

    num_heads: int
    qk_features: int | None = None
    v_features: int | None = None
    widening_factor: int = 1
    dropout_rate: float = 0.0
    variant: str = "deepmind"
    attention: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B N C"], deterministic: bool = True) -> Float[Array, "*B N C"]:
        attended = _attention(self, self.qk_features, self.v_features)(
            layer_norm(dtype=self.dtype, name="norm")(x), deterministic=deterministic
        )
        x = x + _drop(self, attended, deterministic)
        return x + _mlp(self)(layer_norm(dtype=self.dtype, name="mlp_norm")(x), deterministic=deterministic)


class CrossAttend(nn.Module):
    """Cross-attention and MLP; the equations are the module's.

    Attributes:
      num_heads: heads of the attention.
      qk_features: width of all queries together; by default that of the side that `attention_shape` names.
      v_features: width of all values together; `qk_features` by default.
      widening_factor: of the MLP's hidden layer.
      use_query_residual: whether the query itself is added to what it attends to.
      attention_shape: "kv" or "q", the side from which `qk_features` is taken.
      dropout_rate: where it applies depends on `variant`.
      variant: "deepmind" or "hf", see the module.
      attention: implementation of `dot_product_attention`.
      dtype: of the computation.
    """

    num_heads: int = 1
    qk_features: int | None = None
    v_features: int | None = None
    widening_factor: int = 1
    use_query_residual: bool = True
    attention_shape: str = "kv"
    dropout_rate: float = 0.0
    variant: str = "deepmind"
    attention: str | None = None
    dtype: Dtype | None = None

    def __call__(
        self,
        inputs_q: Float[Array, "*B N Cq"],
        inputs_kv: Float[Array, "*B M Ckv"] | None = None,
        kv_mask: Bool[Array, "*B M"] | None = None,
        deterministic: bool = True,
        *,
        q_mask: Bool[Array, "*B N"] | None = None,
        kv: tuple[Float[Array, "*B M H D"], Float[Array, "*B M H Dv"]] | None = None,
    ) -> Float[Array, "*B N Cq"]:
        """Lets `inputs_q` attend to `inputs_kv`, or to the keys and values `kv` from `project_kv`.

        Args:
          inputs_q: [*B, N, Cq].
          inputs_kv: [*B, M, Ckv], to be normalised.
          kv_mask: False for keys that are padding.
          deterministic: no dropout.
          q_mask: False for queries that are padding ("hf" takes no notice).
          kv: instead of `inputs_kv`.
        """
        return self._run(inputs_q, inputs_kv, kv_mask, deterministic, q_mask, kv)

    def project_kv(
        self, inputs_kv: Float[Array, "*B M Ckv"]
    ) -> tuple[Float[Array, "*B M H D"], Float[Array, "*B M H Dv"]]:
        """Keys and values of `inputs_kv`, to be computed once and passed to many calls as `kv`."""
        return self._run(None, inputs_kv)

    # Flax allows one compact method: __call__ runs it to the end, project_kv leaves after the keys and values.
    @nn.compact
    def _run(
        self,
        inputs_q: Any,
        inputs_kv: Any,
        kv_mask: Any = None,
        deterministic: bool = True,
        q_mask: Any = None,
        kv: Any = None,
    ) -> Any:
        if self.attention_shape not in ("kv", "q"):
            raise UsageError(f"attention_shape '{self.attention_shape}' is none of kv, q.")
        if kv is None:
            qk_features = self.qk_features or (inputs_kv.shape[-1] if self.attention_shape == "kv" else None)
            attention = _attention(self, qk_features, self.v_features)
            kv_norm = layer_norm(dtype=self.dtype, name="kv_norm")
            if inputs_q is None:
                return attention.project_kv(kv_norm(inputs_kv))
        else:
            kv_norm = None
            attention = _attention(self, *(x.shape[-2] * x.shape[-1] for x in kv))

        context: dict[str, Any] = dict(q_mask=q_mask, kv_mask=kv_mask)
        if self.variant == "hf":
            lowest = jnp.finfo(jnp.float32).min
            context = {} if kv_mask is None else dict(bias=jnp.where(kv_mask, 0, lowest)[..., None, None, :])
        context |= dict(inputs_kv=inputs_kv, kv=kv, kv_norm=kv_norm, deterministic=deterministic)
        query = layer_norm(dtype=self.dtype, name="q_norm")(inputs_q)
        x = _drop(self, attention(query, **context), deterministic)
        if self.use_query_residual:
            x = inputs_q + x
        return x + _mlp(self)(layer_norm(dtype=self.dtype, name="mlp_norm")(x), deterministic=deterministic)


def _attention(layer: SelfAttend | CrossAttend, qk_features: int | None, v_features: int | None) -> CrossAttention:
    return CrossAttention(
        layer.num_heads,
        qk_features=qk_features,
        v_features=v_features,
        dropout_rate=layer.dropout_rate if layer.variant == "hf" else 0.0,
        attention=layer.attention,
        kernel_init=initialiser(layer.variant, nn.initializers.lecun_normal()),
        dtype=layer.dtype,
        name="attention",
    )


def _mlp(layer: SelfAttend | CrossAttend) -> Mlp:
    return Mlp(layer.widening_factor, layer.dropout_rate, layer.variant, layer.dtype, name="mlp")


def _drop(layer: Any, x: jax.Array, deterministic: bool) -> jax.Array:
    rate = layer.dropout_rate if layer.variant == "deepmind" else 0.0
    return nn.Dropout(rate)(x, deterministic=deterministic)
