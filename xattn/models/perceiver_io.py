"""Perceiver IO (arXiv 2107.14795) and the Perceiver (arXiv 2103.03206).

M input rows x are read by N << M latents z, which work among themselves and are read by O queries, so that the cost is
linear in M and in O:

    encode:  z = CrossAttend(latents [N, D], x);   num_blocks times:  z = SelfAttend_L(.. SelfAttend_1(z))
    decode:  y = CrossAttend(queries [O, E], z) W + b

All blocks share their weights; the layers of a block do not. The layers' equations are in `xattn.layers.perceiver`,
inputs and outputs in `xattn.models.perceiver_processors`, positions in `xattn.layers.positions`. Queries are positions
(trained or Fourier), or the input rows themselves. Each output depends on its own query alone, so that any of them can
be decoded, in any chunks.

The original Perceiver attends to its inputs again before each block (`repeat_cross_attend`) and ends in the mean of the
latents and a linear layer (`ProjectionDecoder`).

Attention weights of the encoder are sown as `cross_attend` [B, H, N, M] and `self_attend_{i}` [num_blocks, B, H, N, N];
with `repeat_cross_attend` the first pass has its own slot and the others are in `repeat` [num_blocks - 1, B, ...].

`variant="hf"` runs the weights as transformers' port does; see the modules named above for each difference.

The decoders of the released code are one here: `Queries` says what is asked for; outputs have the shape of its grid.

Deviations: of the released image classifiers, the one with trained positions has no query residual and the others have
one; the port gives it to all. `use_query_residual` says it for each. Several modalities are decoded one by one, which
changes no number. Trained positions are not interpolated to another grid, as the port can do: an input of another size
is an error.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from xattn.config import UsageError
from xattn.layers.cross_attention import Projection
from xattn.layers.perceiver import CrossAttend, SelfAttend, dense, fan_in_normal, initialiser
from xattn.layers.positions import PositionEncoding, bind, coordinates
from xattn.models.perceiver_processors import Prepared, append, check_names, check_rows, paddings

OBSERVED = {"intermediates": 0, "perturbations": 0}


class Pass(nn.Module):
    """A cross-attend to the inputs, if there is one, and a block of self-attends."""

    cross_attend: nn.Module | None
    self_attend: tuple[nn.Module, ...]

    def __call__(self, z: Any, inputs: Any, input_mask: Any, deterministic: bool) -> tuple[Any, None]:
        if self.cross_attend is not None:
            z = self.cross_attend(z, inputs, input_mask, deterministic)
        for layer in self.self_attend:
            z = layer(z, deterministic)
        return z, None


class PerceiverEncoder(nn.Module):
    """Input rows to latents; the equations are the module's.

    Attributes:
      num_latents: N.
      latent_features: D.
      num_blocks: how often the block is run.
      num_self_attends_per_block: L.
      num_cross_heads, num_self_heads: heads of the two kinds of attention.
      qk_features, v_features: of both kinds; v_features must be D. By default D in the self-attends, and in the
        cross-attend the width that `attention_shape` names.
      attention_shape: "kv" or "q": the side of the cross-attend that gives its default width.
      cross_widening_factor, self_widening_factor: of the MLPs' hidden layers.
      use_query_residual: of the cross-attend.
      repeat_cross_attend: whether a cross-attend comes before every block (the original Perceiver) or the first alone.
      share_first_cross_attend: whether the repeated cross-attends have the weights of the first; among themselves they
        share.
      share_first_block: whether the other blocks have the weights of the first, when cross-attends are repeated.
      dropout_rate: see `xattn.layers.perceiver` for where.
      latent_init_scale: standard deviation of the initial latents' normal, which is cut at two of them.
      remat: whether layers are computed again in the backward pass instead of kept.
      variant: "deepmind" or "hf".
      attention: implementation of `dot_product_attention`.
      dtype: of the computation; the latents' residual stream is float32.
    """

    num_latents: int = 512
    latent_features: int = 1024
    num_blocks: int = 8
    num_self_attends_per_block: int = 6
    num_cross_heads: int = 1
    num_self_heads: int = 8
    qk_features: int | None = None
    v_features: int | None = None
    attention_shape: str = "kv"
    cross_widening_factor: int = 1
    self_widening_factor: int = 1
    use_query_residual: bool = True
    repeat_cross_attend: bool = False
    share_first_cross_attend: bool = False
    share_first_block: bool = True
    dropout_rate: float = 0.0
    latent_init_scale: float = 0.02
    remat: bool = False
    variant: str = "deepmind"
    attention: str | None = None
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B M C"], input_mask: Bool[Array, "B M"] | None = None, *, train: bool = False
    ) -> Float[Array, "B L D"]:
        """Latents of `inputs`, float32; `input_mask` is False for rows that are padding."""
        self._check()
        truncated = nn.initializers.truncated_normal(self.latent_init_scale)
        init = nn.with_logical_partitioning(initialiser(self.variant, truncated), ("latents", "embed"))
        latents: Any = self.param("latents", init, (self.num_latents, self.latent_features))
        z = jnp.broadcast_to(latents.astype(jnp.float32), (inputs.shape[0], *latents.shape))

        first = self._layers()
        again: dict[str, Any] = dict(
            variable_broadcast="params",
            variable_axes=OBSERVED,
            split_rngs={"params": False, "dropout": True},
            in_axes=nn.broadcast,
            check_constancy_invariants=self.is_initializing(),
        )
        arguments = (inputs, input_mask, not train)
        if not self.repeat_cross_attend:
            z = first["cross_attend"](z, *arguments)
            blocks = nn.scan(Pass, length=self.num_blocks, **again)
            return blocks(None, first["self_attend"], name="blocks")(z, *arguments)[0]

        z, _ = Pass(**first, name="first")(z, *arguments)
        if self.num_blocks == 1:
            return z
        # The passes that follow need slots of their own for what is sown, so they are modules of their own, which see
        # the shared parameters as if these were theirs.
        shared = ["cross_attend"] * self.share_first_cross_attend
        if self.share_first_block:
            shared += [f"self_attend_{i}" for i in range(self.num_self_attends_per_block)]
        tied = {name: self.variables["params"][name] for name in shared}
        repeated = nn.map_variables(
            Pass,
            "params",
            trans_in_fn=lambda own: {"params": {**own.get("params", {}), **tied}},
            trans_out_fn=lambda all: {"params": {k: v for k, v in all.get("params", {}).items() if k not in tied}},
            mutable=self.is_initializing(),
        )
        passes = nn.scan(repeated, length=self.num_blocks - 1, **again)
        return passes(**self._layers(parent=None), name="repeat")(z, *arguments)[0]

    def _layers(self, **parent: None) -> dict[str, Any]:
        """The layers of a pass, with their names in this module or, with `parent=None`, for another to name."""
        common: dict[str, Any] = dict(
            qk_features=self.qk_features,
            v_features=self.v_features,
            dropout_rate=self.dropout_rate,
            variant=self.variant,
            attention=self.attention,
            dtype=self.dtype,
            **parent,
        )
        cross, attend = CrossAttend, SelfAttend
        if self.remat:
            cross, attend = nn.remat(CrossAttend, static_argnums=(4,)), nn.remat(SelfAttend, static_argnums=(2,))
        return dict(
            cross_attend=cross(
                self.num_cross_heads,
                widening_factor=self.cross_widening_factor,
                use_query_residual=self.use_query_residual,
                attention_shape=self.attention_shape,
                name=None if parent else "cross_attend",
                **common,
            ),
            self_attend=tuple(
                attend(
                    self.num_self_heads,
                    widening_factor=self.self_widening_factor,
                    name=None if parent else f"self_attend_{i}",
                    **common,
                )
                for i in range(self.num_self_attends_per_block)
            ),
        )

    def _check(self) -> None:
        for name in ("num_blocks", "num_self_attends_per_block"):
            if (count := getattr(self, name)) < 1:
                raise UsageError(f"{name} is {count}: give 1 or more.")
        width = self.latent_features
        if width % self.num_self_heads:
            raise UsageError(
                f"latent_features {width} is not divisible by num_self_heads {self.num_self_heads}: change one of them."
            )
        v_features = self.v_features or self.qk_features or width
        if v_features != width:
            raise UsageError(
                f"v_features {v_features} of the self-attends must equal latent_features: set it to {width}."
            )


@dataclasses.dataclass(frozen=True)
class Queries:
    """What a decoder asks for: one query for each point of an output grid.

    Attributes:
      index_dims: the grid's dims; () for one query and an output without grid axes, such as the logits of a class.
        Ignored without `positions`: the grid is then the input's.
      positions: encoding of the grid; None takes the preprocessed input rows for queries.
      concat_preprocessed_input: whether the input's features (one row for each point) come before the positions.
      subsampled_grid: coordinates of chosen points: "exclusive" of +1 as in the released code, so that they differ from
        those of the whole grid, or "inclusive" as there.
    """

    index_dims: tuple[int, ...] = ()
    positions: PositionEncoding | None = None
    concat_preprocessed_input: bool = False
    subsampled_grid: str = "exclusive"


class DecodeRows(nn.Module):
    """Queries of some rows, and what they read from the latents: one step of a scan."""

    queries: Callable[[Any], jax.Array]
    cross_attend: nn.Module
    output: nn.Module | None

    def __call__(self, carry: None, rows: Any, q_mask: Any, kv: Any) -> tuple[None, Any]:
        queries = self.queries(rows)
        queries = jnp.broadcast_to(queries, (kv[0].shape[0], *queries.shape[-2:]))
        if q_mask is not None and rows is not None:
            q_mask = q_mask[:, rows]
        y = self.cross_attend(queries, kv=kv, q_mask=q_mask)
        return carry, y if self.output is None else self.output(y)


class PerceiverDecoder(nn.Module):
    """Latents to outputs at the points of a grid, or of one grid a modality.

    Attributes:
      queries: a `Queries`, or a mapping of modalities to them, which are padded by trained values to the width of the
        widest + `min_padding_size`.
      output_features: width of the final linear layer; None for no such layer.
      num_heads, qk_features, v_features, widening_factor, use_query_residual: of the cross-attend.
      min_padding_size: see `queries`.
      zero_output: whether the final layer's kernel starts at zero.
      rescale_factor: divides the output.
      decode_chunk_size: queries decoded at once; all by default. A chunk's queries are made where they are needed, and
        made again in the backward pass, so that memory grows with the chunk. Where attention weights are asked for,
        all are decoded at once.
      variant: "deepmind" or "hf".
      attention: implementation of `dot_product_attention`.
      dtype: of the computation.
    """

    queries: Queries | Mapping[str, Queries]
    output_features: int | None = None
    num_heads: int = 1
    qk_features: int | None = None
    v_features: int | None = None
    widening_factor: int = 1
    use_query_residual: bool = False
    min_padding_size: int = 2
    zero_output: bool = False
    rescale_factor: float = 1.0
    decode_chunk_size: int | None = None
    variant: str = "deepmind"
    attention: str | None = None
    dtype: Dtype | None = None

    @property
    def needs_inputs(self) -> bool:
        """Whether queries are made from the preprocessed inputs."""
        queries = self.queries.values() if isinstance(self.queries, Mapping) else [self.queries]
        return any(query.positions is None or query.concat_preprocessed_input for query in queries)

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B L D"],
        prepared: Prepared | None = None,
        query_mask: Bool[Array, "B O"] | None = None,
        subsampled_points: Any = None,
    ) -> Any:
        """Decodes all queries or some.

        Args:
          latents: from the encoder.
          prepared: the preprocessed inputs, if `needs_inputs`.
          query_mask: False for queries that are padding, those of modalities joined in the order of their names.
          subsampled_points: flat row-major indices [n] of the grid, or a dict of them; None for all.

        Returns:
          [B, *index_dims, output_features], or [B, n, output_features] of the points asked for; a dict of them for
          several modalities.

        Raises:
          UsageError: sizes or names that do not fit, or points (unless they are traced) that are not in the grid.
        """
        if self.needs_inputs and prepared is None:
            raise UsageError("the decoder's queries are made from the inputs: pass inputs to decode too.")
        several = isinstance(self.queries, Mapping)
        queries: Any = self.queries if several else {"": self.queries}
        points: Any = subsampled_points if several else {"": subsampled_points}
        points = {} if points is None else points
        check_names("subsampled_points", points, queries)
        parts = prepared.parts if several and prepared is not None else {"": prepared}

        makers, shapes = {}, {}
        for name in sorted(queries):
            chosen = points.get(name)
            makers[name], index_dims = self._maker(name, queries[name], parts.get(name), chosen)
            if chosen is not None:
                _check_points(chosen, index_dims)
            shapes[name] = index_dims if chosen is None else (len(chosen),)
        counts = {name: math.prod(shape) for name, shape in shapes.items()}
        check_rows("query_mask", query_mask, (latents.shape[0], sum(counts.values())), "queries")
        if several:
            widths = {name: jax.eval_shape(maker, None).shape[-1] for name, maker in makers.items()}
            padding = paddings(self, widths, self.min_padding_size)
            makers = {
                name: lambda rows, make=maker, end=padding[name]: append(make(rows), end)
                for name, maker in makers.items()
            }

        attend = CrossAttend(
            self.num_heads,
            qk_features=self.qk_features,
            v_features=self.v_features,
            widening_factor=self.widening_factor,
            use_query_residual=self.use_query_residual,
            variant=self.variant,
            attention=self.attention,
            dtype=self.dtype,
            name="cross_attend",
        )
        output = self._output()
        kv = attend.project_kv(latents)
        outputs, start = {}, 0
        for name, maker in makers.items():
            mask = None if query_mask is None else query_mask[:, start : start + counts[name]]
            y = self._decode(dict(queries=maker, cross_attend=attend, output=output), counts[name], mask, kv)
            outputs[name] = y.reshape(y.shape[0], *shapes[name], y.shape[-1]) / self.rescale_factor
            start += counts[name]
        return outputs if several else outputs[""]

    def _maker(self, name: str, queries: Queries, part: Any, points: Any) -> tuple[Callable, tuple[int, ...]]:
        """A function of row numbers (None for all) to queries [n, E] or [B, n, E], and the dims of their grid."""
        coordinates(1, queries.subsampled_grid)
        index_dims, encode = queries.index_dims, None
        if queries.positions is None:
            index_dims = part.index_dims
        else:
            encode = bind(queries.positions, self, f"{name}_query" if name else "query", index_dims, self.dtype)
        grid = "inclusive" if points is None else queries.subsampled_grid

        def make(rows: Any) -> jax.Array:
            indices = points if rows is None else rows if points is None else points[rows]
            take = (lambda x: x) if indices is None else (lambda x: x[:, indices])
            if encode is None:
                return take(part.rows)
            encoded = encode(indices, grid)
            if not queries.concat_preprocessed_input:
                return encoded
            if part.features.shape[1] != math.prod(index_dims):
                raise UsageError(
                    f"{part.features.shape[1]} input rows cannot be part of the queries of a grid {index_dims}: "
                    "set index_dims to the input's grid, or concat_preprocessed_input to False."
                )
            features = take(part.features)
            return jnp.concatenate([features, jnp.broadcast_to(encoded, (*features.shape[:2], encoded.shape[-1]))], -1)

        return make, index_dims

    def _decode(self, parts: dict[str, Any], count: int, q_mask: Any, kv: Any) -> jax.Array:
        """Outputs [B, count, C] of one modality, in chunks if there are more than one."""
        size = count if self.decode_chunk_size is None else self.decode_chunk_size
        if size < 1:
            raise UsageError(f"decode_chunk_size is {size}: give a positive number, or None for all queries at once.")
        watched = any(self.is_mutable_collection(name) for name in OBSERVED) or "perturbations" in self.variables
        if size >= count or (watched and not self.is_initializing()):
            return DecodeRows(**parts)(None, None, q_mask, kv)[1]
        axes: Any = (0, nn.broadcast, nn.broadcast)
        chunks = nn.scan(
            nn.remat(DecodeRows, prevent_cse=False),
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=axes,
            check_constancy_invariants=self.is_initializing(),
        )
        whole = count - count % size
        y = chunks(**parts)(None, jnp.arange(whole).reshape(-1, size), q_mask, kv)[1]
        y = jnp.moveaxis(y, 0, 1).reshape(y.shape[1], whole, -1)
        if whole == count:
            return y
        rest = DecodeRows(**parts)(None, jnp.arange(whole, count), q_mask, kv)[1]
        return jnp.concatenate([y, rest], axis=1)

    def _output(self) -> Projection | None:
        if self.output_features is None:
            return None
        init = nn.initializers.zeros if self.zero_output else fan_in_normal
        return dense(self.output_features, variant=self.variant, init=init, name="output", dtype=self.dtype)


def _check_points(points: Any, index_dims: tuple[int, ...]) -> None:
    """Raises `UsageError` unless points are [n]; values are checked where they are known before the program runs."""
    if np.ndim(points) != 1:
        raise UsageError(f"subsampled_points have {np.ndim(points)} axes: give flat indices [n] of {index_dims}.")
    if isinstance(points, Tracer) or len(points) == 0:
        return
    known, size = np.asarray(points), math.prod(index_dims)
    if known.min() < 0 or known.max() >= size:
        raise UsageError(
            f"subsampled_points are from {known.min()} to {known.max()} but the grid {index_dims} has {size} points: "
            f"give indices from 0 to {size - 1}."
        )


class ProjectionDecoder(nn.Module):
    """The mean of the latents and a linear layer whose kernel starts at zero: `output_features` logits.

    It has no queries, so that a mask of them or chosen points are refused.
    """

    output_features: int
    variant: str = "deepmind"
    dtype: Dtype | None = None

    needs_inputs = False

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B L D"],
        prepared: Any = None,
        query_mask: Any = None,
        subsampled_points: Any = None,
    ) -> Float[Array, "B K"]:
        del prepared
        if query_mask is not None or subsampled_points is not None:
            raise UsageError("a projection_decoder has no queries: leave out query_mask and subsampled_points.")
        output = dense(
            self.output_features, variant=self.variant, init=nn.initializers.zeros, name="output", dtype=self.dtype
        )
        return output(latents.mean(1))


class EmbeddingDecoder(nn.Module):
    """Float32 logits h E^T + b of the vocabulary whose embeddings E are the text preprocessor's."""

    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, rows: Float[Array, "B O C"], embedding: Float[Array, "V C"]) -> Float[Array, "B O V"]:
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        bias: Any = self.param("bias", init, (embedding.shape[0],))
        rows, embedding = promote_dtype(rows, embedding, dtype=self.dtype)
        return jnp.matmul(rows, embedding.T, preferred_element_type=jnp.float32) + bias


class PerceiverIO(nn.Module):
    """Preprocessor, encoder, decoder and postprocessor.

    `apply(variables, inputs, ...)` takes and returns what the parts do: an array, or a dict of arrays by modality.

    Attributes:
      input_preprocessor: inputs to `Prepared` rows.
      encoder: rows to latents.
      decoder: latents to outputs.
      output_postprocessor: decoded rows to outputs, if they are not outputs yet.
      embedding_decoder: decoded rows to logits of the vocabulary, instead of a postprocessor.
      variant, attention, dtype: `xattn.models.build` hands them to all parts that have the field and don't set it.
    """

    input_preprocessor: nn.Module
    encoder: PerceiverEncoder
    decoder: nn.Module
    output_postprocessor: nn.Module | None = None
    embedding_decoder: EmbeddingDecoder | None = None
    variant: str = "deepmind"
    attention: str | None = None
    dtype: Dtype | None = None

    def __call__(
        self,
        inputs: Any,
        input_mask: Bool[Array, "B M"] | None = None,
        query_mask: Bool[Array, "B O"] | None = None,
        subsampled_points: Any = None,
        *,
        pos: Any = None,
        train: bool = False,
    ) -> Any:
        """Outputs for `inputs`, float32.

        Args:
          inputs: int32 text [B, M], images [B, H, W, C] or videos [B, T, H, W, C], audio [B, S, C], vectors [B, K]; or
            a dict of such by modality.
          input_mask: False for preprocessed rows that are padding.
          query_mask: False for queries that are padding.
          subsampled_points: flat indices [n] of the output grid to be decoded, or a dict of them; None for all.
          pos: coordinates [B, M, d] of the preprocessed rows instead of their grid's, or a dict of them.
          train: dropout and masking (rng collection "dropout"), and BatchNorm's batch statistics.

        Returns:
          What the postprocessor makes of the decoder's output; with `subsampled_points` in [B, n, ...].

        Raises:
          UsageError: sizes, names or options that do not fit.
        """
        prepared = self.input_preprocessor(inputs, pos=pos, train=train)
        latents = self._latents(prepared, input_mask, train)
        return self._finish(self.decoder(latents, prepared, query_mask, subsampled_points))

    def encode(
        self, inputs: Any, input_mask: Bool[Array, "B M"] | None = None, *, pos: Any = None, train: bool = False
    ) -> Float[Array, "B L D"]:
        """The latents, from which `decode` can be called many times."""
        return self._latents(self.input_preprocessor(inputs, pos=pos, train=train), input_mask, train)

    def decode(
        self,
        latents: Float[Array, "B L D"],
        inputs: Any = None,
        query_mask: Bool[Array, "B O"] | None = None,
        subsampled_points: Any = None,
        *,
        pos: Any = None,
        train: bool = False,
    ) -> Any:
        """Outputs from latents. `inputs` are needed where queries are made from them, as for optical flow."""
        prepared = None
        if self.decoder.needs_inputs and inputs is not None:
            prepared = self.input_preprocessor(inputs, pos=pos, train=train)
        return self._finish(self.decoder(latents, prepared, query_mask, subsampled_points))

    def _latents(self, prepared: Prepared, input_mask: Any, train: bool) -> jax.Array:
        check_rows("input_mask", input_mask, prepared.rows.shape[:2], "input rows")
        return self.encoder(prepared.rows, input_mask, train=train)

    def _finish(self, outputs: Any) -> Any:
        if self.output_postprocessor is not None:
            outputs = self.output_postprocessor(outputs)
        if self.embedding_decoder is not None:
            outputs = self.embedding_decoder(outputs, self.input_preprocessor.embedding())
        return jax.tree.map(lambda x: x.astype(jnp.float32), outputs)


def perceiver(
    input_preprocessor: nn.Module,
    encoder: PerceiverEncoder,
    num_classes: int,
    *,
    variant: str = "deepmind",
    attention: str | None = None,
    dtype: Dtype | None = None,
) -> PerceiverIO:
    """The original Perceiver, a classifier: a `PerceiverIO` with a `ProjectionDecoder`.

    Its encoder has `repeat_cross_attend`. The arguments are those of `PerceiverIO`.
    """
    decoder = ProjectionDecoder(num_classes, variant=variant, dtype=dtype)
    return PerceiverIO(input_preprocessor, encoder, decoder, variant=variant, attention=attention, dtype=dtype)


def _fourier(num_bands: int, *max_resolution: int) -> dict[str, Any]:
    return dict(name="fourier_positions", num_bands=num_bands, max_resolution=max_resolution)


def _trainable(features: int, **options: Any) -> dict[str, Any]:
    return dict(name="trainable_positions", features=features, **options)


def _queries(*index_dims: int, positions: dict[str, Any]) -> dict[str, Any]:
    return dict(name="queries", index_dims=index_dims, positions=positions)


def _encoder(
    latents: tuple[int, int], blocks: tuple[int, int], heads: tuple[int, int], remat: bool = False, **options: Any
) -> dict[str, Any]:
    return dict(
        name="perceiver_encoder",
        num_latents=latents[0],
        latent_features=latents[1],
        num_blocks=blocks[0],
        num_self_attends_per_block=blocks[1],
        num_cross_heads=heads[0],
        num_self_heads=heads[1],
        remat=remat,
        **options,
    )


def _language(width: int, num_layers: int, vocab_size: int = 262, length: int = 2048) -> dict[str, Any]:
    return dict(
        name="perceiver_io",
        input_preprocessor=dict(
            name="text_preprocessor", vocab_size=vocab_size, max_positions=length, features=768, embed_init_scale=1.0
        ),
        encoder=_encoder((256, width), (1, num_layers), (8, 8), qk_features=256, v_features=width),
        decoder=dict(
            name="perceiver_decoder",
            queries=_queries(length, positions=_trainable(768)),
            num_heads=8,
            qk_features=256,
            v_features=768,
            use_query_residual=False,
            decode_chunk_size=None,
        ),
        embedding_decoder=dict(name="embedding_decoder"),
    )


_IMAGE_ENCODER = _encoder((512, 1024), (8, 6), (1, 8))

_PIXELS = dict(name="image_preprocessor", prep_type="pixels", positions=_fourier(64, 224, 224))


def _imagenet(input_preprocessor: dict[str, Any], use_query_residual: bool) -> dict[str, Any]:
    return dict(
        name="perceiver_io",
        input_preprocessor=input_preprocessor,
        encoder=_IMAGE_ENCODER,
        decoder=dict(
            name="perceiver_decoder",
            queries=_queries(positions=_trainable(1024)),
            output_features=1000,
            use_query_residual=use_query_residual,
            decode_chunk_size=None,
        ),
    )


def _multimodal() -> dict[str, Any]:
    image, audio = _fourier(32, 16, 56, 56), _fourier(192, 30720)
    return dict(
        name="perceiver_io",
        input_preprocessor=dict(
            name="multimodal_preprocessor",
            modalities=dict(
                audio=dict(name="audio_preprocessor", samples_per_patch=16, positions=audio),
                image=dict(name="image_preprocessor", prep_type="patches", spatial_downsample=4, positions=image),
                label=dict(name="one_hot_preprocessor"),
            ),
            mask_probs=dict(audio=0.0, image=0.0, label=1.0),
            min_padding_size=4,
        ),
        encoder=_encoder((784, 512), (1, 8), (1, 8)),
        decoder=dict(
            name="perceiver_decoder",
            queries=dict(
                audio=_queries(1920, positions=audio),
                image=_queries(16, 224, 224, positions=image),
                label=_queries(positions=_trainable(1024)),
            ),
            output_features=512,
            use_query_residual=False,
            decode_chunk_size=16384,
        ),
        output_postprocessor=dict(
            name="multimodal_postprocessor",
            modalities=dict(
                audio=dict(name="audio_postprocessor", samples_per_patch=16),
                image=dict(name="projection_postprocessor", features=3),
                label=dict(name="projection_postprocessor", features=700),
            ),
        ),
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "language": _language(1280, 26),
    "language_plus_plus": _language(1536, 40),
    "language_sentencepiece": _language(1280, 26, vocab_size=32000, length=512),
    "imagenet_learned": _imagenet(
        dict(
            name="image_preprocessor",
            prep_type="conv1x1",
            num_channels=256,
            positions=_trainable(256, index_dims=(224, 224), project_features=256),
        ),
        use_query_residual=False,
    ),
    "imagenet_fourier": _imagenet(_PIXELS, use_query_residual=True),
    "imagenet_conv": _imagenet(
        dict(name="image_preprocessor", prep_type="conv", spatial_downsample=4, positions=_fourier(64, 56, 56)),
        use_query_residual=True,
    ),
    "optical_flow": dict(
        name="perceiver_io",
        input_preprocessor=dict(
            name="image_preprocessor",
            prep_type="patches",
            temporal_downsample=2,
            conv_after_patching=True,
            num_channels=64,
            positions=_fourier(64, 368, 496),
        ),
        encoder=_encoder((2048, 512), (1, 24), (1, 16), remat=True),
        decoder=dict(
            name="perceiver_decoder",
            queries=dict(name="queries"),
            output_features=2,
            qk_features=512,
            v_features=512,
            use_query_residual=False,
            zero_output=True,
            rescale_factor=100.0,
            decode_chunk_size=None,
        ),
    ),
    "multimodal": _multimodal(),
    "perceiver": dict(
        name="perceiver",
        input_preprocessor=_PIXELS,
        encoder=_IMAGE_ENCODER | dict(repeat_cross_attend=True),
        num_classes=1000,
    ),
    "perceiver_single_cross_attend": dict(
        name="perceiver", input_preprocessor=_PIXELS, encoder=_IMAGE_ENCODER, num_classes=1000
    ),
}
"""Configs, for `xattn.models.build`, of the published models: language models of bytes and of SentencePiece, three
ImageNet classifiers, optical flow, video autoencoding, and the original Perceiver with 8 cross-attends or one."""
