"""What Perceiver IO reads and writes: pre- and postprocessors (arXiv 2107.14795, section 3.2; released DeepMind code).

A preprocessor makes an input into rows: features beside position encodings (`concat`), or their sum (`add`).

    text    Embed(ids) + table                                          [B, M]          -> [B, M, C]
    image   pixels | patches | convolutions, Fourier or trained grid    [B, (T,) H, W, C] -> [B, (t) h w, C]
    flow    the same, on two frames whose pixels are their 3x3 surroundings (`xattn.ops.patches.flow_patches`)
    audio   patches of samples, Fourier or trained grid                 [B, S, 1]       -> [B, S / p, C]
    one-hot the vector itself                                           [B, K]          -> [B, 1, K]
    multimodal: each modality is padded by trained values to the width of the widest + `min_padding_size`; rows are
            replaced by a trained mask token with the modality's probability; then all are joined in the names' order

A postprocessor makes rows into outputs. Names, initial values and order of axes are those of the released code.

Deviations: transformers' port subsamples the batch and the channels where "pixels" are downsampled; "hf" here does what
was meant. Masking by chance takes its bits from the rng collection "dropout".
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from xattn.config import UsageError
from xattn.layers.convolution import CONV_AXES, image_norm
from xattn.layers.perceiver import dense, fan_in_normal, initialiser
from xattn.layers.positions import PositionEncoding, TrainablePositions, bind
from xattn.ops.patches import depth_to_space, space_to_depth

TABLE = nn.initializers.truncated_normal(0.02)


@struct.dataclass
class Prepared:
    """What a preprocessor returns.

    Attributes:
      rows: [B, M, C], what the encoder attends to.
      features: [B, M, F], the same without positions.
      index_dims: shape of the grid whose M points the rows are; (M,) for several modalities.
      parts: for several modalities, the `Prepared` of each.
    """

    rows: Any
    features: Any
    index_dims: tuple[int, ...] = struct.field(pytree_node=False)
    parts: Mapping[str, Any] = struct.field(default_factory=dict)


class TextPreprocessor(nn.Module):
    """Embedded ids plus a trained vector for each position.

    Attributes:
      vocab_size: V; 262 for bytes, whose ids are byte + 6.
      max_positions: longest sequence.
      features: C.
      embed_init_scale: of the initial embeddings' normal; the release has 1.
      variant: "deepmind" or "hf", for the initial values.
    """

    vocab_size: int = 262
    max_positions: int = 2048
    features: int = 768
    embed_init_scale: float = 1.0
    variant: str = "deepmind"

    def setup(self) -> None:
        init = initialiser(self.variant, nn.initializers.truncated_normal(self.embed_init_scale))
        init = nn.with_logical_partitioning(init, ("vocab", "embed"))
        self.token_embed = nn.Embed(self.vocab_size, self.features, embedding_init=init)
        positions = TrainablePositions(self.features, index_dims=(self.max_positions,), variant=self.variant)
        self.pos_embs = positions.table(self, "pos_embs", (self.max_positions,))

    def __call__(self, inputs: Int[Array, "B M"], *, pos: Any = None, train: bool = False) -> Prepared:
        """Rows of ids; `pos` and `train` change nothing."""
        del pos, train
        length = inputs.shape[1]
        if length > self.max_positions:
            raise UsageError(f"the text has {length} tokens but max_positions is {self.max_positions}: cut the text.")
        features = self.token_embed(inputs)
        return Prepared(features + self.pos_embs[:length], features, (length,))

    def embedding(self) -> Float[Array, "V C"]:
        """The table of embeddings."""
        return self.token_embed.embedding


class ImagePreprocessor(nn.Module):
    """Rows of an image [B, H, W, C] or a video [B, T, H, W, C].

    Attributes:
      positions: of the grid that is left after downsampling.
      prep_type: "pixels" takes every s-th pixel; "patches" moves blocks into channels; "conv" is log4(s) times
        [7x7 convolution of stride 2, BatchNorm, relu, 3x3 max-pool of stride 2], at least once; "conv1x1" is a 1x1
        convolution of stride s. Videos of one frame are taken for images after "patches".
      spatial_downsample: s.
      temporal_downsample: the same for frames, with "pixels" and "patches".
      num_channels: of the convolutions.
      conv_after_patching: whether a linear layer of `num_channels` follows "patches".
      use_batchnorm: whether "conv" has BatchNorm.
      concat_or_add_pos: "concat" or "add".
      n_extra_pos_mlp: residual linear layers on the positions.
      axis_name: mapped axis over which BatchNorm averages.
      variant: "hf" has one stage of "conv" only, pads its convolution by (3, 3) for (2, 3) and its max-pool not at all.
      dtype: of the computation.
    """

    positions: PositionEncoding | None = None
    prep_type: str = "pixels"
    spatial_downsample: int = 1
    temporal_downsample: int = 1
    num_channels: int = 64
    conv_after_patching: bool = False
    use_batchnorm: bool = True
    concat_or_add_pos: str = "concat"
    n_extra_pos_mlp: int = 0
    axis_name: str | None = None
    variant: str = "deepmind"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "..."], *, pos: Float[Array, "B M d"] | None = None, train: bool = False
    ) -> Prepared:
        """Rows of `inputs`; `pos` are coordinates to be used instead of the grid's; `train` is for BatchNorm.

        Raises:
          UsageError: an option or size that does not fit, or `pos` for another number of rows.
        """
        stride, frames = self.spatial_downsample, self.temporal_downsample
        if min(stride, frames) < 1:
            raise UsageError(
                f"spatial_downsample is {stride} and temporal_downsample {frames}: give 1 or more, 1 keeps everything."
            )
        if self.prep_type in ("conv", "conv1x1") and frames != 1:
            raise UsageError(f"temporal_downsample is {frames} but '{self.prep_type}' keeps every frame: use 1.")
        if self.prep_type == "pixels":
            time = (slice(None, None, frames),) if inputs.ndim == 5 else ()
            x = inputs[(slice(None), *time, slice(None, None, stride), slice(None, None, stride))]
        elif self.prep_type == "patches":
            x = space_to_depth(inputs, spatial=stride, temporal=frames)
            x = x[:, 0] if x.ndim == 5 and x.shape[1] == 1 else x
            if self.conv_after_patching:
                x = dense(self.num_channels, variant=self.variant, name="patch_linear", dtype=self.dtype)(x)
        elif self.prep_type == "conv":
            x = self._stem(inputs, train)
        elif self.prep_type == "conv1x1":
            x = self._conv(1, strides=stride, bias_init=_named(nn.initializers.zeros, ("norm",)), name="conv1x1")(
                inputs
            )
        else:
            raise UsageError(f"prep_type '{self.prep_type}' is none of pixels, patches, conv, conv1x1.")
        return _with_positions(self, x, pos, self.concat_or_add_pos)

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        hf = self.variant == "hf"
        stages = 1 if hf else round(math.log(self.spatial_downsample, 4))
        if not hf and (stages < 1 or 4**stages != self.spatial_downsample):
            raise UsageError(
                f"spatial_downsample is {self.spatial_downsample}: 'conv' needs 4 for one stage or another power of 4."
            )
        for i in range(stages):
            suffix = f"_{i}" if i else ""
            padding = ((3, 3), (3, 3)) if hf else "SAME"
            x = self._conv(7, strides=2, padding=padding, use_bias=False, name=f"conv{suffix}")(x)
            if self.use_batchnorm:
                norm: dict[str, Any] = dict(kind="batch", train=train, axis_name=self.axis_name, dtype=self.dtype)
                x = image_norm(x, name=f"bn{suffix}", **norm)
            x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), "VALID" if hf else "SAME")
        return x

    def _conv(self, size: int, **kwargs: Any) -> nn.Conv:
        init = _named(initialiser(self.variant, fan_in_normal), CONV_AXES)
        return nn.Conv(self.num_channels, (size, size), kernel_init=init, dtype=self.dtype, **kwargs)


class AudioPreprocessor(nn.Module):
    """Rows of waveforms [B, S, C]: the samples of a patch beside its position.

    Attributes:
      positions: of the patches.
      samples_per_patch: p.
      concat_or_add_pos: "concat" or "add".
      n_extra_pos_mlp: residual linear layers on the positions.
      variant: "deepmind" or "hf", for the initial values.
      dtype: of the computation.
    """

    positions: PositionEncoding | None = None
    samples_per_patch: int = 96
    concat_or_add_pos: str = "concat"
    n_extra_pos_mlp: int = 0
    variant: str = "deepmind"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B S C"], *, pos: Float[Array, "B M d"] | None = None, train: bool = False
    ) -> Prepared:
        """Rows of `inputs`; `pos` are coordinates to be used instead of the grid's."""
        del train
        batch, samples, channels = inputs.shape
        if samples % self.samples_per_patch:
            raise UsageError(
                f"{samples} audio samples do not split into patches of {self.samples_per_patch}: cut or pad the audio."
            )
        x = inputs.reshape(batch, -1, self.samples_per_patch * channels)
        return _with_positions(self, x, pos, self.concat_or_add_pos)


class OneHotPreprocessor(nn.Module):
    """One row [B, 1, K] of a vector [B, K], without position."""

    def __call__(self, inputs: Float[Array, "B K"], *, pos: Any = None, train: bool = False) -> Prepared:
        """The vector as one row; `pos` and `train` change nothing."""
        del pos, train
        return Prepared(inputs[:, None], inputs[:, None], ())


class MultimodalPreprocessor(nn.Module):
    """Rows of several modalities, joined in the order of their names; see the module.

    Attributes:
      modalities: name to preprocessor.
      mask_probs: name to the probability that a row becomes the mask token; without it there are no mask tokens.
        Probabilities of 0 and 1 need no rng.
      train_mask_probs: the same in training, `mask_probs` by default.
      min_padding_size: trained values that the widest modality gets too.
      variant: "deepmind" or "hf", for the initial values.
    """

    modalities: Mapping[str, nn.Module]
    mask_probs: Mapping[str, float] | None = None
    train_mask_probs: Mapping[str, float] | None = None
    min_padding_size: int = 2
    variant: str = "deepmind"

    @nn.compact
    def __call__(self, inputs: Any, *, pos: Any = None, train: bool = False) -> Prepared:
        """Rows of a dict of inputs; `pos` is a dict of coordinates for those that it names.

        Raises:
          UsageError: names that are not those of `modalities`, or a probability that is none.
        """
        pos = {} if pos is None else pos
        check_names("inputs", inputs, self.modalities, exact=True)
        check_names("pos", pos, self.modalities)
        parts = {
            name: self.modalities[name].copy(name=name)(inputs[name], pos=pos.get(name), train=train)
            for name in sorted(self.modalities)
        }
        probs = self.train_mask_probs if train and self.train_mask_probs is not None else self.mask_probs
        if probs is not None:
            check_names("mask_probs", probs, self.modalities, exact=True)
        widths = {name: part.rows.shape[-1] for name, part in parts.items()}
        padding = paddings(self, widths, self.min_padding_size)
        padded = {name: append(part.rows, padding[name]) for name, part in parts.items()}
        if probs is not None:
            padded = {name: self._mask(name, rows, probs[name]) for name, rows in padded.items()}
        rows = jnp.concatenate(list(padded.values()), axis=1)
        return Prepared(rows, rows, (rows.shape[1],), parts)

    def _mask(self, name: str, rows: jax.Array, prob: float) -> jax.Array:
        if not 0 <= prob <= 1:
            raise UsageError(f"mask_probs of {name} is {prob}: give a probability from 0 to 1.")
        init = _named(initialiser(self.variant, TABLE), (None, "norm"))
        token = self.param(f"{name}_mask_token", init, (1, rows.shape[-1]))
        if prob in (0, 1):
            return jnp.broadcast_to(token, rows.shape) if prob else rows
        if not self.has_rng("dropout"):
            raise UsageError(f"mask_probs of {name} is {prob}: pass a 'dropout' rng, or a probability of 0 or 1.")
        masked = jax.random.bernoulli(self.make_rng("dropout"), prob, rows.shape[:2])
        return jnp.where(masked[..., None], token, rows)


class ProjectionPostprocessor(nn.Module):
    """A linear map of each row to `features` values, such as classes or colours."""

    features: int
    variant: str = "deepmind"
    dtype: Dtype | None = None

    def setup(self) -> None:
        self.dense = dense(self.features, variant=self.variant, name=None, dtype=self.dtype)
        nn.share_scope(self, self.dense)

    def __call__(self, rows: Float[Array, "B *N C"]) -> Float[Array, "B *N K"]:
        return self.dense(rows)


class AudioPostprocessor(nn.Module):
    """The samples of each row's patch, [B, N, C] to [B, N p, 1] with p = `samples_per_patch`."""

    samples_per_patch: int = 96
    variant: str = "deepmind"
    dtype: Dtype | None = None

    def setup(self) -> None:
        self.dense = dense(self.samples_per_patch, variant=self.variant, name=None, dtype=self.dtype)
        nn.share_scope(self, self.dense)

    def __call__(self, rows: Float[Array, "B N C"]) -> Float[Array, "B S 1"]:
        return self.dense(rows).reshape(rows.shape[0], -1, 1)


class ImagePostprocessor(nn.Module):
    """Images [B, H, W, K] or videos [B, T, H, W, K] from a grid of rows.

    Attributes:
      postproc_type: "pixels" changes nothing; "patches" moves channels into blocks of pixels; "conv" has transposed
        convolutions of size 4, each doubling the image (two of them, or as many as the factors ask for if there is a
        `temporal_upsample`); "conv1x1" is a 1x1 convolution with stride `spatial_upsample`.
      spatial_upsample, temporal_upsample: factors of "patches" and "conv". For "conv" the spatial one is 4, or both are
        powers of 2 if there is a temporal one.
      features: K, for the two types with convolutions.
      input_reshape_size: the grid, where rows come as [B, M, C].
      variant: "deepmind" or "hf", for the initial values.
      dtype: of the computation.
    """

    postproc_type: str = "pixels"
    spatial_upsample: int = 1
    temporal_upsample: int = 1
    features: int | None = None
    input_reshape_size: tuple[int, ...] | None = None
    variant: str = "deepmind"
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, rows: Float[Array, "..."]) -> Float[Array, "..."]:
        x = rows
        if self.input_reshape_size is not None:
            x = rows.reshape(rows.shape[0], *self.input_reshape_size, rows.shape[-1])
        factors = (self.temporal_upsample, self.spatial_upsample)
        if self.postproc_type == "patches":
            return depth_to_space(x, spatial=self.spatial_upsample, temporal=self.temporal_upsample)
        if self.postproc_type == "pixels":
            if factors != (1, 1):
                raise UsageError(f"'pixels' cannot enlarge by {factors}: use 'patches' or 'conv'.")
            return x
        if self.postproc_type not in ("conv", "conv1x1"):
            raise UsageError(f"postproc_type '{self.postproc_type}' is none of pixels, patches, conv, conv1x1.")
        if self.features is None:
            raise UsageError(f"postproc_type '{self.postproc_type}' needs the number of output channels: set features.")
        init = _named(initialiser(self.variant, fan_in_normal), ("conv_time", *CONV_AXES))
        flat = _named(initialiser(self.variant, fan_in_normal), CONV_AXES)
        common: dict[str, Any] = dict(dtype=self.dtype, bias_init=_named(nn.initializers.zeros, ("norm",)))
        if self.postproc_type == "conv1x1":
            strides = (self.spatial_upsample,) * 2
            return nn.Conv(self.features, (1, 1), strides, kernel_init=flat, name="conv1x1", **common)(x)
        if self.temporal_upsample == 1:
            if self.spatial_upsample != 4:
                raise UsageError(f"spatial_upsample is {self.spatial_upsample}: 'conv' without time enlarges by 4.")
            x = nn.ConvTranspose(2 * self.features, (4, 4), (2, 2), kernel_init=flat, name="conv_0", **common)(x)
            return nn.ConvTranspose(self.features, (4, 4), (2, 2), kernel_init=flat, name="conv_1", **common)(
                nn.relu(x)
            )
        if any(factor < 1 or factor & (factor - 1) for factor in factors):
            raise UsageError(f"'conv' cannot enlarge by {factors} in time and space: give powers of 2.")
        times, spaces = (round(math.log2(factor)) for factor in factors)
        steps = max(times, spaces)
        for i in range(steps):
            strides = (1 + (i < times), 1 + (i < spaces), 1 + (i < spaces))
            width = self.features * 2 ** (steps - 1 - i)
            x = nn.relu(x) if i else x
            x = nn.ConvTranspose(width, (4, 4, 4), strides, kernel_init=init, name=f"conv_{i}", **common)(x)
        return x


class MultimodalPostprocessor(nn.Module):
    """The outputs of each modality: `modalities` maps its name to a postprocessor."""

    modalities: Mapping[str, nn.Module]

    @nn.compact
    def __call__(self, rows: Mapping[str, Array]) -> dict[str, Array]:
        check_names("outputs", rows, self.modalities, exact=True)
        return {name: self.modalities[name].copy(name=name)(rows[name]) for name in sorted(self.modalities)}


def check_names(what: str, given: Any, known: Mapping[str, Any], *, exact: bool = False) -> None:
    """Raises `UsageError` unless `given` is a mapping whose names are among those of `known`, or all of them."""
    wanted = f"give a dict for {', '.join(sorted(known))}."
    if not isinstance(given, Mapping):
        raise UsageError(f"{what} must name their modalities: {wanted}")
    if not set(given) <= set(known) or (exact and set(given) != set(known)):
        raise UsageError(f"{what} are for {sorted(given)}: {wanted}")


def check_rows(what: str, given: Any, expected: tuple[int, ...], rows: str) -> None:
    """Raises `UsageError` unless `given`, if there is one, has `expected` (B, N) for its first two axes."""
    if given is not None and given.shape[:2] != expected:
        raise UsageError(
            f"{what} has shape {given.shape} but there are {expected} {rows}: give one entry for each of them."
        )


def paddings(module: Any, widths: Mapping[str, int], min_padding_size: int) -> dict[str, jax.Array]:
    """Trained values [1, C], parameters `{name}_padding` of `module`, that bring the rows of each name to one width.

    This width is the largest of `widths` + `min_padding_size`.
    """
    width = max(widths.values()) + min_padding_size
    init = _named(initialiser(module.variant, TABLE), (None, "norm"))
    return {name: module.param(f"{name}_padding", init, (1, width - own)) for name, own in widths.items()}


def append(rows: Float[Array, "*B N C"], padding: Float[Array, "1 D"]) -> Float[Array, "*B N E"]:
    """The rows with the same padding at the end of each."""
    return jnp.concatenate([rows, jnp.broadcast_to(padding, (*rows.shape[:-1], padding.shape[-1]))], axis=-1)


def _named(init: nn.initializers.Initializer, axes: tuple[str | None, ...]) -> Any:
    return nn.with_logical_partitioning(init, axes)


def _with_positions(module: Any, x: jax.Array, pos: jax.Array | None, how: str) -> Prepared:
    """Flattens the grid of x and joins the positions of `module` to it."""
    if how not in ("concat", "add"):
        raise UsageError(f"concat_or_add_pos '{how}' is none of concat, add.")
    index_dims = x.shape[1:-1]
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    check_rows("pos", pos, x.shape[:2], "input rows")
    if module.positions is None:
        return Prepared(x, x, index_dims)
    encoding = bind(module.positions, module, "pos", index_dims, module.dtype)(pos=pos)
    for i in range(module.n_extra_pos_mlp):
        layer = dense(encoding.shape[-1], variant=module.variant, name=f"pos_mlp_{i}", dtype=module.dtype)
        encoding = encoding + layer(encoding)
        encoding = nn.relu(encoding) if i < module.n_extra_pos_mlp - 1 else encoding
    encoding = jnp.broadcast_to(encoding, (*x.shape[:2], encoding.shape[-1]))
    if how == "concat":
        return Prepared(jnp.concatenate([x, encoding], axis=-1), x, index_dims)
    if encoding.shape[-1] != x.shape[-1]:
        raise UsageError(
            f"features have {x.shape[-1]} channels and positions {encoding.shape[-1]}, which cannot be added: "
            "concat them, or set num_channels or project_features."
        )
    return Prepared(x + encoding, x, index_dims)
