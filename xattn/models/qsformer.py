"""QSFormer: few-shot classification by query-support transformers (arXiv 2208.12398; released code SissiW/QSFormer).

An episode has N classes with K support images each, and Q queries. Two branches compare each query with each class:

    F   = CIFE(image)                                          [h, w, C] per image: cross-scale image encoder
    Fs  = prototype of a class over its K support maps
    global: S   = EncoderLayer_l(GAP(Fs));  A = MHA_l(X, X, X) + X          X = GAP(Fq) before the first block
            P_l = softmax over classes of (W LN(A)) (W LN(S))^T             [Q, N]; no 1/sqrt(C), one head
            X  <- X + query_residual * P_l (W LN(S));      m_g = sum_l P_l  the score is the attention itself
    local:  F~  = patch_mix F + (1 - patch_mix) MHA(F, F, F)                over the h w positions of one image
            m_l = emd_scores(F~q, F~s)                                      see xattn.ops.emd
    logits  = (1 - global_weight) m_l + global_weight global_temperature m_g

The queries attend to each other, so that with `query_self_attn="joint"`, the paper's, the method is transductive:
the scores of a query depend on the queries beside it. "diagonal" lets each query attend to itself alone.

Deviations, with the switch that restores the released behaviour:
  - CIFE's attention runs over the positions of an image as the paper says. The released code leaves `batch_first` unset
    and attends over the images of a batch at equal positions (`attn_axis="batch"`).
  - All parameters train. The released optimizer leaves out patchFormer (`freeze_patchformer=True`).
  - K > 1 takes the mean of the support maps (`prototypes="sfc"` fits them by gradient descent as DeepEMD does).
  - Optimal transport is entropic (`solver="exact"`).
  - From the paper, but as released: keys and values share one projection, U is added without LayerNorm and weighted,
    and the mix in the local branch is convex. The tensors that the released code holds but never uses are left out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float, PRNGKeyArray

from xattn.config import UsageError
from xattn.layers.convolution import CONV_AXES
from xattn.layers.cross_attention import record
from xattn.layers.episode import embed_episode
from xattn.layers.transformer import DecoderLayer, EncoderLayer, layer_norm, torch_attention, torch_dense, uniform
from xattn.ops.attention import attention_weights
from xattn.ops.emd import emd_scores


def _tokens(maps: Float[Array, "*B h w C"]) -> Float[Array, "*B P C"]:
    """Positions in row-major order."""
    return maps.reshape(*maps.shape[:-3], -1, maps.shape[-1])


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} '{value}' is none of {', '.join(allowed)}.")


class CIFE(nn.Module):
    """Cross-scale interactive feature extractor: the last map of `backbone` attends to the map before it.

        M = EncoderLayer(conv_3(stage 3));  F = stage 4 + residual_scale * DecoderLayer(stage 4, memory=M)

    conv_3 brings stage 3 to the width and size of stage 4: 4x4 with stride 2 where stage 4 is smaller, 3x3 with
    stride 1 where the two are equally large.

    Attributes:
      backbone: images to a tuple of feature maps.
      num_heads: of all three attentions.
      mlp_dim: hidden width of the feed-forward parts.
      dropout_rate: of both layers, attention weights included.
      attn_axis: "tokens", or "batch" for the released code (see the module).
      residual_scale: weight of the decoder's output.
      attention: implementation of `dot_product_attention`.
      dtype: of the computation.
    """

    backbone: nn.Module
    num_heads: int = 8
    mlp_dim: int = 2048
    dropout_rate: float = 0.5
    attn_axis: str = "tokens"
    residual_scale: float = 0.1
    attention: str | None = None
    dtype: Dtype | None = None

    @property
    def independent_features(self) -> bool:
        """Whether an image's feature is the same whatever images are embedded with it."""
        return self.attn_axis == "tokens"

    @nn.compact
    def __call__(self, images: Float[Array, "*B H W C"], *, train: bool = False) -> tuple[Float[Array, "..."], ...]:
        """Returns the stages of `backbone` with the last one replaced by F."""
        _one_of("attn_axis", self.attn_axis, ("tokens", "batch"))
        *stages, third, fourth = self.backbone(images, train=train)
        width = fourth.shape[-1]
        size, stride = (3, 1) if third.shape[-3:-1] == fourth.shape[-3:-1] else (4, 2)
        init = uniform((size * size * third.shape[-1]) ** -0.5)
        memory = nn.Conv(
            width,
            (size, size),
            strides=stride,
            padding=1,
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(init, CONV_AXES),
            bias_init=nn.with_logical_partitioning(init, ("norm",)),
            name="conv_3",
        )(third)
        memory, x = _tokens(memory), _tokens(fourth)
        if self.attn_axis == "batch":
            memory, x = memory.swapaxes(-3, -2), x.swapaxes(-3, -2)
        layer: dict[str, Any] = dict(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            dropout_rate=self.dropout_rate,
            attention=self.attention,
            dtype=self.dtype,
        )
        memory = EncoderLayer(**layer, name="encoder_layer")(memory, deterministic=not train)
        x = DecoderLayer(**layer, name="decoder_layer")(x, memory, deterministic=not train)
        if self.attn_axis == "batch":
            x = x.swapaxes(-3, -2)
        return (*stages, third, fourth + self.residual_scale * x.reshape(fourth.shape))


class SampleFormer(nn.Module):
    """One block of the global branch; the equations are the module's.

    Attributes:
      num_heads: of the support's and the queries' self-attention; the cross-attention has one head.
      mlp_dim: hidden width of the support's feed-forward part.
      support_dropout: rate in the support's encoder layer.
      query_dropout: rate on the weights of the queries' self-attention.
      query_self_attn: "joint", or "diagonal" for queries that don't see each other.
      projection_norm: "layer" for W LN(.), or "l2" for W(.) scaled to unit length (the released code on FC100).
      attention: implementation of `dot_product_attention`.
      dtype: of the computation.
    """

    num_heads: int
    mlp_dim: int
    support_dropout: float
    query_dropout: float
    query_self_attn: str
    projection_norm: str
    attention: str | None
    dtype: Dtype | None

    @nn.compact
    def __call__(
        self, support: Float[Array, "*B N C"], query: Float[Array, "*B Q C"], *, deterministic: bool
    ) -> tuple[Float[Array, "*B Q N"], Float[Array, "*B Q C"]]:
        """Returns the scores P (rows sum to 1) and the support values that they gather for each query, in float32."""
        _one_of("query_self_attn", self.query_self_attn, ("joint", "diagonal"))
        _one_of("projection_norm", self.projection_norm, ("layer", "l2"))
        width = query.shape[-1]
        common: dict[str, Any] = dict(num_heads=self.num_heads, attention=self.attention, dtype=self.dtype)
        encode = EncoderLayer(mlp_dim=self.mlp_dim, dropout_rate=self.support_dropout, **common, name="encoder_layer")
        support = encode(support, deterministic=deterministic)

        attend = torch_attention(width, dropout_rate=self.query_dropout, **common, name="query_attn")
        if self.query_self_attn == "joint":
            query += attend(query, deterministic=deterministic)
        else:
            query += attend(query[..., None, :], deterministic=deterministic)[..., 0, :]

        project = torch_dense(width, width, ("embed", "embed_out"), dtype=self.dtype, name="projection")
        if self.projection_norm == "layer":
            norm = layer_norm(dtype=self.dtype, name="norm")
            query, support = project(norm(query)), project(norm(support))
        else:
            query, support = _unit(project(query)), _unit(project(support))

        scores = record(self, attention_weights(query[..., None, :], support[..., None, :], scale=1.0))
        scores = scores[..., 0, :, :]
        return scores, scores @ support.astype(jnp.float32)


def _unit(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """x / max(|x|, 1e-12), with a gradient at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def fit_prototypes(
    support: Float[Array, "*B N K P C"],
    key: PRNGKeyArray,
    scores: Callable[[Array, Array], Array],
    *,
    epochs: int = 100,
    batch_size: int = 4,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
) -> Float[Array, "*B N P C"]:
    """DeepEMD's structured fully connected layer (arXiv 2003.06777, section 3.5): prototypes fitted to the support set.

    Starts at the mean of each class and runs SGD on the cross-entropy of scores(support images, prototypes). Each epoch
    is a random order of the N K images in minibatches, the last of which may be smaller. As in torch, the first step is
    not dampened: m = g, then m = momentum m + (1 - momentum) g.

    Args:
      support: feature maps of the support images, positions in one axis.
      key: for the order of the images; each leading index has its own.
      scores: ([*B, n, P, C], [*B, N, P, C]) to logits [*B, n, N].
      epochs: passes over the support set.
      batch_size: images a step.
      learning_rate: of SGD.
      momentum: of SGD, and its dampening.
    """
    *batch, ways, shots, _, _ = support.shape
    images = support.reshape(*batch, ways * shots, *support.shape[-2:])
    labels = jnp.repeat(jnp.arange(ways), shots)
    steps = -(-ways * shots // batch_size)
    order = jax.random.uniform(key, (epochs, *batch, ways * shots)).argsort(-1)
    order = jnp.pad(order, [(0, 0)] * (order.ndim - 1) + [(0, steps * batch_size - ways * shots)])
    order = jnp.moveaxis(order.reshape(epochs, *batch, steps, batch_size), -2, 1)
    order = order.reshape(epochs * steps, *batch, batch_size)
    present = (jnp.arange(steps * batch_size) < ways * shots).reshape(steps, batch_size)
    present = jnp.tile(present / present.sum(-1, keepdims=True), (epochs, 1))
    step_size = jnp.full(epochs * steps, 1 - momentum).at[0].set(1)

    def loss(prototypes, picked, weights):
        logits = scores(jnp.take_along_axis(images, picked[..., None, None], axis=-3), prototypes)
        return (weights * optax.softmax_cross_entropy_with_integer_labels(logits, labels[picked])).sum()

    def step(carry, inputs):
        prototypes, trace = carry
        picked, weights, size = inputs
        trace = momentum * trace + size * jax.grad(loss)(prototypes, picked, weights)
        return (prototypes - learning_rate * trace, trace), None

    mean = support.mean(-3)
    (prototypes, _), _ = jax.lax.scan(step, (mean, jnp.zeros_like(mean)), (order, present, step_size))
    return prototypes


class QSFormer(nn.Module):
    """Query-support transformers on top of an image encoder; the equations are the module's.

    Attributes:
      encoder: images [*B, H, W, C] to a tuple of feature maps, the last one last; `CIFE` in the paper.
      num_blocks: L, blocks of the global branch.
      num_heads: heads of the global branch's self-attentions.
      patch_num_heads: heads of patchFormer.
      mlp_dim: hidden width of the feed-forward parts of the global branch.
      support_dropout, query_dropout, patch_dropout: rates in the support's encoder, on the weights of the queries'
        self-attention and on those of patchFormer.
      patch_mix: share of the encoder's map in F~ (lam1).
      query_residual: weight of the gathered support in the query stream (lam2).
      global_weight: share of the global branch in the logits (lam).
      global_temperature: factor of the global scores in the logits.
      emd_temperature: score of two equal maps in the local branch.
      query_self_attn: "joint", or "diagonal" for queries that don't see each other.
      projection_norm: "layer", or "l2" as released for FC100; see `SampleFormer`.
      freeze_patchformer: whether `frozen_parameters` names patchFormer, as if released.
      prototypes: "mean" of the support maps, or "sfc", which fits them (`fit_prototypes`) and stops their gradient.
      solver: of the transport problem, "sinkhorn" or "exact".
      train_sinkhorn, eval_sinkhorn: (epsilon, iterations) in training (and in "sfc") and in evaluation.
      attention: implementation of `dot_product_attention`.
      dtype: of the computation; scores and transport are float32.
    """

    encoder: nn.Module
    num_blocks: int = 3
    num_heads: int = 1
    patch_num_heads: int = 8
    mlp_dim: int = 2048
    support_dropout: float = 0.5
    query_dropout: float = 0.5
    patch_dropout: float = 0.1
    patch_mix: float = 0.3
    query_residual: float = 0.9
    global_weight: float = 0.1
    global_temperature: float = 1.0
    emd_temperature: float = 12.5
    query_self_attn: str = "joint"
    projection_norm: str = "layer"
    freeze_patchformer: bool = False
    prototypes: str = "mean"
    solver: str = "sinkhorn"
    train_sinkhorn: tuple[float, int] = (0.05, 50)
    eval_sinkhorn: tuple[float, int] = (0.02, 200)
    attention: str | None = None
    dtype: Dtype | None = None

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """Paths of parameters that the optimizer leaves alone and keeps out of the gradient's norm."""
        return ("patchformer",) if self.freeze_patchformer else ()

    @property
    def independent_features(self) -> bool:
        """Whether an image's feature is the same whatever images are embedded with it."""
        return getattr(self.encoder, "independent_features", True)

    @property
    def transductive(self) -> bool:
        """Whether the scores of a query depend on the queries beside it."""
        return self.query_self_attn == "joint" or not self.independent_features

    def __call__(
        self, support: Float[Array, "*B N K H W C"], query: Float[Array, "*B Q H W C"], *, train: bool = False
    ) -> dict[str, Float[Array, "..."]]:
        """Classifies the queries of an episode.

        Args:
          support: normalised images of N classes.
          query: normalised images.
          train: whether dropout ("dropout" rng) and the batch's statistics are used. "sfc" prototypes take their
            random order from the "sfc" rng where there is one.

        Returns:
          logits, global_scores (m_g, rows sum to L) and local_logits (m_l), all float32 [*B, Q, N]; patch_support
          [*B, N, h, w, C] and patch_query [*B, Q, h, w, C], the maps F~ that the local branch compares.
        """
        return self.classify(*embed_episode(self.encoder, support, query, train=train), train=train)

    def features(self, images: Float[Array, "*B H W C"], *, train: bool = False) -> Float[Array, "*B h w D"]:
        """Last feature map of each image."""
        return self.encoder(images, train=train)[-1]

    @nn.compact
    def classify(
        self, support: Float[Array, "*B N K h w C"], query: Float[Array, "*B Q h w C"], *, train: bool = False
    ) -> dict[str, Float[Array, "..."]]:
        """Does what `__call__` does, from feature maps."""
        support = self._prototypes(_tokens(support))
        query_maps, query = query, _tokens(query)

        s, x, m_g = support.mean(-2), query.mean(-2), jnp.float32(0)
        for i in range(self.num_blocks):
            block = SampleFormer(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim,
                support_dropout=self.support_dropout,
                query_dropout=self.query_dropout,
                query_self_attn=self.query_self_attn,
                projection_norm=self.projection_norm,
                attention=self.attention,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            scores, gathered = block(s, x, deterministic=not train)
            m_g += scores
            x += self.query_residual * gathered

        patchformer = torch_attention(
            query.shape[-1],
            num_heads=self.patch_num_heads,
            dropout_rate=self.patch_dropout,
            attention=self.attention,
            dtype=self.dtype,
            name="patchformer",
        )
        rows = jnp.concatenate([support, query], axis=-3)
        rows = self.patch_mix * rows + (1 - self.patch_mix) * patchformer(rows, deterministic=not train)
        support, query = jnp.split(rows, [support.shape[-3]], axis=-3)
        m_l = self._local_logits(query, support, train)
        return {
            "logits": (1 - self.global_weight) * m_l + self.global_weight * self.global_temperature * m_g,
            "global_scores": m_g,
            "local_logits": m_l,
            "patch_support": support.reshape(*support.shape[:-2], *query_maps.shape[-3:]),
            "patch_query": query.reshape(query_maps.shape),
        }

    def _local_logits(self, query: Float[Array, "*B Q P C"], support: Float[Array, "*B N P C"], train: bool) -> Array:
        epsilon, iterations = self.train_sinkhorn if train else self.eval_sinkhorn
        return emd_scores(
            query,
            support,
            temperature=self.emd_temperature,
            solver=self.solver,
            epsilon=epsilon,
            iterations=iterations,
        )

    def _prototypes(self, support: Float[Array, "*B N K P C"]) -> Float[Array, "*B N P C"]:
        _one_of("prototypes", self.prototypes, ("mean", "sfc"))
        if self.prototypes == "mean" or support.shape[-3] == 1:
            return support.mean(-3)
        key = self.make_rng("sfc") if self.has_rng("sfc") else jax.random.key(0)
        support = jax.lax.stop_gradient(support.astype(jnp.float32))
        return fit_prototypes(
            support, key, lambda images, maps: (1 - self.global_weight) * self._local_logits(images, maps, train=True)
        )


_PAPER = dict(
    num_heads=1, mlp_dim=2048, support_dropout=0.5, query_dropout=0.5, patch_dropout=0.1, emd_temperature=12.5
)

VARIANTS: dict[str, dict[str, Any]] = {
    "miniimagenet": _PAPER
    | dict(
        encoder=dict(num_heads=10, dropout_rate=0.5),
        num_blocks=3,
        patch_num_heads=8,
        patch_mix=0.3,
        query_residual=0.9,
        global_weight=0.1,
        global_temperature=1.0,
        projection_norm="layer",
    ),
    "tieredimagenet": _PAPER
    | dict(
        encoder=dict(num_heads=8, dropout_rate=0.5),
        num_blocks=3,
        patch_num_heads=8,
        patch_mix=0.5,
        query_residual=0.1,
        global_weight=0.1,
        global_temperature=1.0,
        projection_norm="layer",
    ),
    "fc100": _PAPER
    | dict(
        encoder=dict(num_heads=8, dropout_rate=0.5),
        num_blocks=4,
        patch_num_heads=1,
        patch_mix=0.7,
        query_residual=0.05,
        global_weight=0.4,
        global_temperature=0.5,
        projection_norm="l2",
    ),
    "cub": _PAPER
    | dict(
        encoder=dict(num_heads=8, dropout_rate=0.1),
        num_blocks=2,
        patch_num_heads=1,
        patch_mix=0.99,
        query_residual=0.1,
        global_weight=0.3,
        global_temperature=0.1,
        projection_norm="layer",
    ),
}
"""Keywords of `QSFormer`, and of its `CIFE` encoder on a `ResNet12`, for 84x84 images of each data set."""
