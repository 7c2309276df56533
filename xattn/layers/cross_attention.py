"""Multi-head attention of one sequence over another, or over itself, as one Linen module."""

import math
import string
from itertools import islice
from typing import Any, Literal, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float

from xattn.config import UsageError
from xattn.ops.attention import Mask, additive_attention, attention_weights, dot_product_attention, dropout
from xattn.ops.attention.absorbed import Affine, Norm, absorbed_attention, absorbing_pays
from xattn.ops.attention.additive import additive_scores
from xattn.ops.attention.xla import softmax, weighted_sum
from xattn.ops.products import einsum

Initializer = nn.initializers.Initializer


class Projection(nn.Module):
    """A linear map from the last axes of the input to `features`, with a logical name for each kernel axis.

    Parameters `kernel` [*in, *features] and `bias` [*features], initialised as `nn.DenseGeneral`, which
    itself names the axes of the flattened kernel and therefore cannot be initialised under a mesh.

    Attributes:
      features: shape of the output axes.
      axes: logical names of the kernel's axes; those before `features` are contracted.
      bias_axes: logical names of the bias's axes.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    bias_axes: tuple[str, ...]
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @overload
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]: ...

    @overload
    def __call__(self, x: Float[Array, "..."], *, as_affine: Literal[True]) -> Affine: ...

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *, as_affine: bool = False) -> Float[Array, "..."] | Affine:
        """The projection of `x`, or with `as_affine` only the parameters that it would be projected with.

        One method for both, since Flax allows one that makes parameters.
        """
        contracted = len(self.axes) - len(self.features)
        inputs = x.shape[-contracted:]

        def kernel_init(rng, shape, dtype):
            flat = (math.prod(inputs), math.prod(self.features))
            return self.kernel_init(rng, flat, dtype).reshape(shape)

        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(kernel_init, self.axes),
            (*inputs, *self.features),
            self.param_dtype,
        )
        bias = None
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(self.bias_init, self.bias_axes)
            bias = self.param("bias", bias_init, self.features, self.param_dtype)
        if as_affine:
            return Affine(kernel, bias)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        letters = iter(string.ascii_lowercase)
        rows, cin, cout = ("".join(islice(letters, n)) for n in (x.ndim - contracted, contracted, len(self.features)))
        x = einsum(f"{rows}{cin},{cin}{cout}->{rows}{cout}", x, kernel)
        return x if bias is None else x + bias


class CrossAttention(nn.Module):
    """Multi-head attention:  out(concat_h softmax(q_h k_h^T / sqrt(D)) v_h)  (arXiv 1706.03762, 3.2.2).

    `inputs_q` asks, `inputs_kv` answers; without `inputs_kv` (and `kv`) it is self-attention. The parameter
    tree is that of `nn.MultiHeadDotProductAttention`: `query`, `key`, `value` with kernels [C, H, D] and
    biases [H, D], `out` with kernel [H, Dv, C] and bias [C]; `query_ln`, `key_ln` with scale [D] if
    `normalize_qk`; `energy` [H, D] if the score is additive.

    The float32 weights before dropout are visible as `attention_weights` [*B, H, N, M]: sown into
    `intermediates` if that collection is mutable, and passed through `self.perturb` if `perturbations` is
    mutable or holds this module's entry. Otherwise the fused path runs and no weights need to exist.

    Where the queries are so few that it is faster, `inputs_kv` is not projected at all: its projections are absorbed
    into the queries and into the output (`xattn.ops.attention.absorbed`), which is the same function. Naming
    an implementation in `attention`, or looking at the weights, projects.

    Attributes:
      num_heads: H.
      num_kv_heads: G, heads of keys and values, each shared by H / G query heads; H by default.
      qk_features: H * D, the width of all queries together; that of `inputs_q` by default.
      v_features: H * Dv; `qk_features` by default.
      out_features: width of the output; that of `inputs_q` by default.
      dropout_rate: dropout of weights, with the rng collection "dropout".
      use_bias: biases in `query`, `key` and `value`, and in `out` unless `out_bias` says otherwise.
      out_bias: bias in `out`.
      normalize_qk: LayerNorm without bias on each head of q and k (arXiv 2302.05442, 2).
      logits_soft_cap: c in c tanh(s / c).
      temperature: divides the scores.
      score: "dot", or "additive" for energy . tanh(q + k) (arXiv 1409.0473, A.1.2).
      attention: name of the implementation, see `dot_product_attention`; None picks the fastest.
      dtype: of the computation; by default that to which inputs and parameters promote.
      param_dtype: of the parameters.
      kernel_init, bias_init: of `query`, `key`, `value`, `out`.
      out_kernel_init: of `out`; `kernel_init` by default.

    Deviations: unlike Linen's module, a query without any key gets zeros from the values instead of their
    mean, the softmax is in float32 whatever `dtype` is, and dropout differs between batch entries and heads.
    """

    num_heads: int
    num_kv_heads: int | None = None
    qk_features: int | None = None
    v_features: int | None = None
    out_features: int | None = None
    dropout_rate: float = 0.0
    use_bias: bool = True
    out_bias: bool | None = None
    normalize_qk: bool = False
    logits_soft_cap: float | None = None
    temperature: float = 1.0
    score: str = "dot"
    attention: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    out_kernel_init: Initializer | None = None

    def __call__(
        self,
        inputs_q: Float[Array, "*B N Cq"],
        inputs_kv: Float[Array, "*B M Ckv"] | None = None,
        *,
        kv: tuple[Float[Array, "*B M G D"], Float[Array, "*B M G Dv"]] | None = None,
        mask: Bool[Array, "..."] | Mask | None = None,
        bias: Float[Array, "..."] | None = None,
        q_mask: Bool[Array, "*B N"] | None = None,
        kv_mask: Bool[Array, "*B M"] | None = None,
        kv_norm: nn.LayerNorm | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*B N Cout"]:
        """Attends from `inputs_q` to `inputs_kv`, to `kv`, or to itself.

        Args:
          inputs_q: [*B, N, Cq].
          inputs_kv: [*B, M, Ckv].
          kv: keys and values from `project_kv`, instead of `inputs_kv`.
          mask: bool, broadcastable to [*B, H, N, M], True = may attend; or a `Mask`.
          bias: added to the scores, broadcastable to [*B, H, N, M].
          q_mask: [*B, N], False for queries that are padding (their output is that of no key: the bias).
          kv_mask: [*B, M], False for keys that are padding.
          kv_norm: a module of the caller's that is to be applied to `inputs_kv` first. Given here instead of called
            there, it too can be done chunk by chunk. (`project_kv` keeps what it computes: normalise before it.)
          deterministic: no dropout.

        Returns:
          [*B, N, Cout].

        Raises:
          UsageError: if heads do not divide a width, or `kv` is given with `inputs_kv` or `kv_norm`.
          ValueError: if shapes do not fit.
        """
        if inputs_kv is not None and kv is not None:
            raise UsageError("CrossAttention got both inputs_kv and kv: pass one of them.")
        if kv_norm is not None and kv is not None:
            raise UsageError("CrossAttention got both kv_norm and kv: normalise what project_kv takes.")
        parts = Mask(q_mask=q_mask, kv_mask=kv_mask)
        if mask is not None:
            parts = parts & (mask if isinstance(mask, Mask) else Mask(dense=mask))
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        return self._run(inputs_q, inputs_kv, kv, kv_norm, mask=parts, bias=bias, deterministic=deterministic)

    def project_kv(
        self, inputs_kv: Float[Array, "*B M Ckv"]
    ) -> tuple[Float[Array, "*B M G D"], Float[Array, "*B M G Dv"]]:
        """Keys and values of a context, to be computed once and passed to many calls as `kv`.

        Raises:
          UsageError: if `qk_features` is None, so that the width follows `inputs_q`, and there are no
            parameters yet that would tell it.
        """
        return self._run(None, inputs_kv)

    # Flax allows one compact method: __call__ runs it to the end, project_kv leaves after the keys and values.
    @nn.compact
    def _run(
        self,
        inputs_q: Any,
        inputs_kv: Any,
        kv: Any = None,
        kv_norm: nn.LayerNorm | None = None,
        *,
        mask: Mask | None = None,
        bias: Any = None,
        deterministic: bool = True,
    ) -> Any:
        if self.score not in ("dot", "additive"):
            raise UsageError(f"score is '{self.score}': use 'dot' or 'additive'.")
        if self.score == "additive" and self.attention is not None:
            raise UsageError(f"attention '{self.attention}' has no additive score: leave attention None.")
        num_kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % num_kv_heads:
            raise UsageError(
                f"num_kv_heads {num_kv_heads} does not divide num_heads {self.num_heads}: choose a divisor."
            )
        width = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        in_axes, bias_axes = ("embed", "heads", "kv"), ("heads", "kv")

        def projection(name: str, heads: int, head_width: int) -> Projection:
            return Projection(
                (heads, head_width),
                in_axes,
                bias_axes,
                use_bias=self.use_bias,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=name,
                **width,
            )

        def project(name: str, x: jax.Array, heads: int, head_width: int) -> jax.Array:
            x = projection(name, heads, head_width)(x)
            if self.normalize_qk and name != "value":
                scale_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
                x = nn.LayerNorm(use_bias=False, scale_init=scale_init, name=f"{name}_ln", **width)(x)
            return _constrain(x, "length", "act_heads", "act_kv")

        qk_width, v_width = self._head_widths(inputs_q)
        absorbing = inputs_q is not None and kv is None and self._absorbs(inputs_q, inputs_kv, kv_norm)
        if kv is None and not absorbing:
            inputs_kv = inputs_kv if kv_norm is None else kv_norm(inputs_kv)
            kv = (
                project("key", inputs_kv, num_kv_heads, qk_width),
                project("value", inputs_kv, num_kv_heads, v_width),
            )
        if inputs_q is None:
            return kv
        query = project("query", inputs_q, self.num_heads, qk_width)

        energy = None
        if self.score == "additive":
            energy = self.param(
                "energy",
                nn.with_logical_partitioning(nn.initializers.lecun_normal(in_axis=-1, out_axis=-2), bias_axes),
                (self.num_heads, qk_width),
                self.param_dtype,
            )
        scores = {
            "mask": mask,
            "bias": bias,
            "scale": (qk_width**-0.5 if energy is None else 1.0) / self.temperature,
            "logits_soft_cap": self.logits_soft_cap,
        }
        rate = 0.0 if deterministic else self.dropout_rate
        dropped = {"dropout_rate": rate, "dropout_rng": self.make_rng("dropout") if rate else None}
        if absorbing:
            key = projection("key", num_kv_heads, qk_width)(inputs_kv, as_affine=True)
            value = projection("value", num_kv_heads, v_width)(inputs_kv, as_affine=True)
            out = absorbed_attention(query, inputs_kv, key, value, norm=_as_norm(kv_norm), **scores, **dropped)
        else:
            out = self._attend(query, kv, energy, scores, **dropped)

        out = Projection(
            (self.out_features or inputs_q.shape[-1],),
            ("heads", "kv", "embed"),
            ("norm",),
            use_bias=self.use_bias if self.out_bias is None else self.out_bias,
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.bias_init,
            name="out",
            **width,
        )(out)
        return _constrain(out, "length", "act_embed")

    def _attend(
        self, query: Any, kv: Any, energy: Any, scores: dict[str, Any], *, dropout_rate: float, dropout_rng: Any
    ) -> Any:
        key, value = kv
        if observed(self):
            if energy is None:
                weights = attention_weights(query, key, **scores)
            else:
                weights = softmax(additive_scores(query, key, energy, **scores))[0]
            weights = record(self, weights)
            if dropout_rate:
                weights = dropout.drop_all(weights, dropout_rng, dropout_rate)
            return weighted_sum(weights, value)

        scores = scores | {"dropout_rate": dropout_rate, "dropout_rng": dropout_rng}
        if energy is None:
            return dot_product_attention(query, key, value, implementation=self.attention, **scores)
        return additive_attention(query, key, value, energy, **scores)

    def _absorbs(self, inputs_q: Any, inputs_kv: Any, kv_norm: nn.LayerNorm | None) -> bool:
        if self.is_initializing() or observed(self) or self.attention or self.normalize_qk or self.score != "dot":
            return False
        if kv_norm is not None and (kv_norm.reduction_axes, kv_norm.feature_axes) != (-1, -1):
            return False
        *batch, num_keys, channels = inputs_kv.shape
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads or self.num_heads}
        width, v_width = self._head_widths(inputs_q)
        return absorbing_pays(
            math.prod(batch), inputs_q.shape[-2], num_keys, channels, **heads, width=width, v_width=v_width
        )

    def _head_widths(self, inputs_q: Any) -> tuple[int, int]:
        """D and Dv, from the fields, the width of `inputs_q`, or the parameters that exist."""
        qk_features = self.qk_features
        if qk_features is None and inputs_q is not None:
            qk_features = inputs_q.shape[-1]
        if qk_features is None:
            if not self.has_variable("params", "key"):
                raise UsageError("project_kv cannot know the width of the keys: set qk_features.")
            kernel = meta.unbox(self.get_variable("params", "key"))["kernel"]
            qk_features = self.num_heads * kernel.shape[-1]
        v_features = self.v_features or qk_features
        for name, features in (("qk_features", qk_features), ("v_features", v_features)):
            if features % self.num_heads:
                raise UsageError(
                    f"{name} {features} is not divisible by num_heads {self.num_heads}: change one of them."
                )
        return qk_features // self.num_heads, v_features // self.num_heads


_WEIGHTS = "attention_weights"


def observed(module: nn.Module) -> bool:
    """Whether somebody looks at the attention weights of `module`, so that they have to exist."""
    return not module.is_initializing() and (module.is_mutable_collection("intermediates") or _perturbed(module))


def record(module: nn.Module, weights: Float[Array, "*B H N M"]) -> Float[Array, "*B H N M"]:
    """Shows `weights` as `attention_weights` of `module`; returns what to go on with.

    They are sown into `intermediates` if that collection is mutable, and passed through `perturb` if `perturbations`
    is mutable or holds the module's entry; never while initialising.
    """
    if module.is_initializing():
        return weights
    module.sow("intermediates", _WEIGHTS, weights)
    return module.perturb(_WEIGHTS, weights) if _perturbed(module) else weights


def _perturbed(module: nn.Module) -> bool:
    return module.is_mutable_collection("perturbations") or module.has_variable("perturbations", _WEIGHTS)


def _as_norm(module: nn.LayerNorm | None) -> Norm | None:
    if module is None:
        return None
    params = meta.unbox(module.variables.get("params", {}))
    return Norm(params.get("scale"), params.get("bias"), module.epsilon)


def _constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Names the last axes of an activation, and its first one "batch" if there are leading axes."""
    leading = x.ndim - len(axes)
    batch = ("batch",) + (None,) * (leading - 1) if leading else ()
    return nn.with_logical_constraint(x, batch + axes)
