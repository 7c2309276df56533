"""Small Perceiver IO models of DeepMind's released code: weights that a seed fills, inputs, and outputs by Haiku.

The models are those of the published notebooks with small sizes. Only `shapes` and `reference` need Haiku and the
released modules: the folder that holds `perceiver/` must be on the path.
"""

import contextlib
import zlib
from typing import Any
from unittest import mock

import numpy as np

# Sizes that all models share; the other numbers below are the published ones or as small.
ENCODER = dict(num_self_attends_per_block=3, num_blocks=2, z_index_dim=5, num_z_channels=16, num_self_attend_heads=4)
CLASSES, LENGTH, FLOW_SIZE = 7, 9, (6, 7)
FRAMES, SIDE, PATCHES, PATCH = 2, 8, 6, 16


def inputs(name: str) -> dict[str, Any]:
    """Keyword arguments of our model: two or three examples, of which the first has no padding unless it is text.

    The last text is padding alone. Images are standard normal; those for optical flow are plain pairs of frames, from
    which the 3x3 surroundings are still to be taken.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    if name == "language":
        mask = np.arange(LENGTH) < np.array([[LENGTH - 2], [LENGTH - 5], [0]])
        tokens = np.where(mask, rng.integers(6, 262, mask.shape), 0).astype(np.int32)
        return dict(inputs=tokens, input_mask=mask, query_mask=mask)
    points = {}
    if name == "multimodal":
        x = dict(
            audio=normal(2, PATCHES * PATCH, 1),
            image=normal(2, FRAMES, SIDE, SIDE, 3),
            label=np.eye(11, dtype=np.float32)[[0, 2]],
        )
        rows = PATCHES + FRAMES * (SIDE // 4) ** 2 + 1
        pixels = rng.choice(16 * 224 * 224, 20, replace=False).astype(np.int32)
        patches = rng.choice(1920, 3, replace=False).astype(np.int32)
        points = dict(subsampled_points=dict(audio=patches, image=pixels, label=None))
    else:
        # An odd and an even side: the paddings of the convolution differ.
        size = {"imagenet_learned": (4, 4), "imagenet_conv": (37, 34), "optical_flow": (2, *FLOW_SIZE)}
        shape = size.get(name, (6, 7))
        rows = 10 * 9 if name == "imagenet_conv" else shape[-2] * shape[-1]
        x = normal(2, *shape, 3)
    mask = np.stack([np.ones(rows, bool), rng.random(rows) < 0.7])
    return dict(inputs=x, input_mask=mask) | points


def fill(shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights by name: about 1 for the scale of a norm, kernels that keep the size of numbers, none of them zero."""

    def values(name, shape):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("var_ema/average"):
            return rng.uniform(0.5, 1.5, shape)
        x = rng.normal(size=shape)
        if name.endswith("/w"):
            return x / np.sqrt(np.prod(shape[:-1]))
        if name.endswith("/scale"):
            return 1 + 0.2 * x
        return (0.5 if name.endswith("embs") or name.endswith("embeddings") else 0.1) * x

    return {name: values(name, tuple(shape)).astype(np.float32) for name, shape in shapes.items()}


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names, "module/parameter", and shapes of Haiku's parameters and averages."""
    import jax

    # Averages are made in training alone.
    made = jax.eval_shape(
        lambda key: _transformed(name).init(key, **inputs(name), is_training=True), jax.random.PRNGKey(0)
    )
    return {
        f"{module}/{key}": tuple(x.shape)
        for tree in made
        for module, leaves in tree.items()
        for key, x in leaves.items()
        if key not in ("hidden", "counter")
    }


def reference(name: str, arrays: dict[str, np.ndarray], given: dict[str, Any], exact: bool = False) -> Any:
    """What the released code gives for the weights and for keyword arguments of our model.

    With `exact`, Fourier features are computed in float64 and rounded once, which the released code does not do.
    """
    import jax
    from perceiver import position_encoding

    params: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for path, x in arrays.items():
        module, _, key = path.rpartition("/")
        (state if key == "average" else params).setdefault(module, {})[key] = x
    for leaves in state.values():
        leaves |= dict(hidden=leaves["average"], counter=np.int32(1))
    module = position_encoding.FourierPositionEncoding
    made = mock.patch.object(module, "__call__", _exact_features) if exact else contextlib.nullcontext()
    with made, jax.default_matmul_precision("highest"):
        out, _ = _transformed(name).apply(params, state, jax.random.PRNGKey(0), **given, is_training=False)
    return jax.tree.map(np.asarray, out)


def _exact_features(self, batch_size, pos=None):
    """FourierPositionEncoding.__call__ in float64: of the whole grid, or of chosen points of it."""
    axes = [np.linspace(-1, 1, n) for n in self._index_dims]
    if pos is None:
        pos = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    else:  # points of the grid that ends before 1
        sizes = np.array(self._index_dims)
        pos = -1 + 2 * np.rint((np.asarray(pos[0], np.float64) + 1) * sizes / 2) / sizes
    bands = np.stack([np.linspace(1, resolution / 2, self._num_bands) for resolution in self._max_resolution])
    angles = np.pi * (pos[:, :, None] * bands).reshape(len(pos), -1)
    features = np.concatenate([pos, np.sin(angles), np.cos(angles)], -1).astype(np.float32)
    return np.broadcast_to(features, (batch_size, *features.shape))


def _transformed(name):
    import haiku as hk

    program = dict(language=_language, optical_flow=_flow, multimodal=_multimodal).get(name)
    return hk.transform_with_state(program or (lambda **given: _imagenet(name, **given)))


def _fourier(bands, *resolution):
    features = dict(num_bands=bands, max_resolution=resolution, sine_only=False, concat_pos=True)
    return dict(position_encoding_type="fourier", fourier_position_encoding_kwargs=features)


def _trainable(channels):
    table = dict(num_channels=channels, init_scale=0.02)
    return dict(position_encoding_type="trainable", trainable_position_encoding_kwargs=table)


def _language(inputs, input_mask, query_mask, is_training):
    import haiku as hk
    from perceiver import io_processors, perceiver, position_encoding

    embed = hk.Embed(vocab_size=262, embed_dim=24)
    x = embed(inputs)
    x = x + position_encoding.TrainablePositionEncoding(index_dim=LENGTH, num_channels=24)(x.shape[0])
    sizes = dict(num_cross_attend_heads=2, qk_channels=8, v_channels=16)
    decoder = perceiver.BasicDecoder(
        output_num_channels=16,
        output_index_dims=LENGTH,
        qk_channels=8,
        v_channels=12,
        num_heads=4,
        final_project=False,
        use_query_residual=False,
        **_trainable(24),
    )
    model = perceiver.Perceiver(encoder=perceiver.PerceiverEncoder(**ENCODER, **sizes), decoder=decoder)
    rows = model(
        x, is_training=is_training, input_mask=input_mask.astype(np.int32), query_mask=query_mask.astype(np.int32)
    )
    return io_processors.EmbeddingDecoder(embedding_matrix=embed.embeddings)(rows)


def _imagenet(name, inputs, input_mask, is_training):
    from perceiver import io_processors, perceiver

    preprocessor = {
        "imagenet_learned": dict(
            _trainable(10), prep_type="conv1x1", project_pos_dim=8, num_channels=6, spatial_downsample=1
        ),
        "imagenet_fourier": dict(_fourier(64, 224, 224), prep_type="pixels", spatial_downsample=1),
        "imagenet_conv": dict(_fourier(64, 56, 56), prep_type="conv"),
    }[name]
    residual = name != "imagenet_learned"
    model = perceiver.Perceiver(
        input_preprocessor=io_processors.ImagePreprocessor(**preprocessor),
        encoder=perceiver.PerceiverEncoder(**ENCODER),
        decoder=perceiver.ClassificationDecoder(CLASSES, use_query_residual=residual, **_trainable(16)),
    )
    return model(inputs, is_training=is_training, input_mask=input_mask.astype(np.int32))


def _flow(inputs, input_mask, is_training):
    from perceiver import io_processors, perceiver

    positions = _fourier(64, 368, 496)
    preprocessor = io_processors.ImagePreprocessor(
        prep_type="patches", spatial_downsample=1, conv_after_patching=True, temporal_downsample=2, **positions
    )
    model = perceiver.Perceiver(
        input_preprocessor=preprocessor,
        encoder=perceiver.PerceiverEncoder(**ENCODER),
        decoder=perceiver.FlowDecoder(FLOW_SIZE, rescale_factor=100.0, use_query_residual=False, **positions),
    )
    patches = io_processors.patches_for_flow(inputs)
    return model(patches, is_training=is_training, input_mask=input_mask.astype(np.int32))


def _multimodal(inputs, input_mask, subsampled_points, is_training):
    from perceiver import io_processors, perceiver

    audio, image = _fourier(192, 30720), _fourier(32, 16, 56, 56)
    preprocessor = io_processors.MultimodalPreprocessor(
        min_padding_size=4,
        modalities=dict(
            audio=io_processors.AudioPreprocessor(samples_per_patch=PATCH, **audio),
            image=io_processors.ImagePreprocessor(prep_type="patches", spatial_downsample=4, **image),
            label=io_processors.OneHotPreprocessor(),
        ),
        mask_probs=dict(image=0.0, audio=0.0, label=1.0),
    )
    postprocessor = io_processors.MultimodalPostprocessor(
        modalities=dict(
            audio=io_processors.AudioPostprocessor(samples_per_patch=PATCH),
            image=io_processors.ProjectionPostprocessor(num_outputs=3),
            label=io_processors.ClassificationPostprocessor(num_classes=11),
        )
    )
    # The decoders of the modalities make queries, no more.
    decoder = perceiver.MultimodalDecoder(
        subsampled_index_dims={m: 1 if points is None else len(points) for m, points in subsampled_points.items()},
        modalities=dict(
            audio=perceiver.BasicDecoder(output_index_dims=(1920,), output_num_channels=20, **audio),
            image=perceiver.BasicVideoAutoencodingDecoder(
                output_shape=(2, 16, 224, 224), output_num_channels=20, **image
            ),
            label=perceiver.ClassificationDecoder(num_classes=11, **_trainable(400)),
        ),
        num_outputs=None,
        output_num_channels=20,
        use_query_residual=False,
    )
    model = perceiver.Perceiver(
        input_preprocessor=preprocessor,
        encoder=perceiver.PerceiverEncoder(**ENCODER, name="encoder"),
        decoder=decoder,
        output_postprocessor=postprocessor,
    )
    mask = input_mask.astype(np.int32)
    return model(inputs, is_training=is_training, subsampled_output_points=subsampled_points, input_mask=mask)
