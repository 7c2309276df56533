"""Pre- and postprocessors: order of rows and channels, positions, padding and masking of modalities, refused sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.variables import normal, random_variables
from xattn.config import UsageError
from xattn.layers.positions import FourierPositions, TrainablePositions
from xattn.models import build
from xattn.ops.patches import flow_patches, space_to_depth

FOURIER = dict(name="fourier_positions", num_bands=3, max_resolution=(8, 8))
IMAGE = dict(name="image_preprocessor", positions=FOURIER)


def prepare(config, inputs, variables=None, **kwargs):
    module = build(config)
    variables = random_variables(module, inputs) if variables is None else variables
    return variables, jax.jit(lambda v, x: module.apply(v, x, **kwargs))(variables, inputs)


# Images


def test_pixels_are_rows_before_their_positions():
    image = normal(2, 6, 8, 3)
    _, out = prepare(IMAGE | dict(spatial_downsample=2), image)
    assert out.index_dims == (3, 4)
    np.testing.assert_array_equal(out.features, image[:, ::2, ::2].reshape(2, 12, 3))
    positions = FourierPositions(3, (8, 8)).grid((3, 4))  # of what is left after downsampling
    np.testing.assert_allclose(out.rows, jnp.concatenate([out.features, jnp.stack([positions] * 2)], -1), atol=1e-7)
    video = normal(2, 4, 6, 8, 3)
    _, out = prepare(IMAGE | dict(spatial_downsample=2, temporal_downsample=3, positions=None), video)
    np.testing.assert_array_equal(out.rows, video[:, ::3, ::2, ::2].reshape(2, 24, 3))
    assert out.index_dims == (2, 3, 4)


def test_positions_can_be_given():
    image, pos = normal(2, 2, 3, 1), normal(2, 6, 2, seed=1)
    _, out = prepare(IMAGE, image, pos=pos)
    np.testing.assert_allclose(out.rows[..., 1:], FourierPositions(3, (8, 8)).at_positions((2, 3), pos), atol=1e-5)
    trained = IMAGE | dict(positions=dict(name="trainable_positions", features=4))
    variables, out = prepare(trained, image, pos=pos)  # takes no notice
    np.testing.assert_array_equal(out.rows[..., 1:], jnp.stack([variables["params"]["pos_embs"]] * 2))


def test_frames_of_optical_flow_become_one_image():
    frames = flow_patches(normal(1, 2, 4, 6, 3))
    config = IMAGE | dict(prep_type="patches", temporal_downsample=2, conv_after_patching=True, num_channels=5)
    variables, out = prepare(config, frames)
    linear = variables["params"]["patch_linear"]
    assert linear["kernel"].shape == (54, 5) and out.index_dims == (4, 6)
    pair = jnp.concatenate([frames[:, 0], frames[:, 1]], axis=-1).reshape(1, 24, 54)
    np.testing.assert_allclose(out.features, pair @ linear["kernel"] + linear["bias"], atol=1e-5)
    video = normal(1, 4, 4, 6, 2)
    _, out = prepare(config | dict(conv_after_patching=False, spatial_downsample=2, positions=None), video)
    np.testing.assert_array_equal(out.rows, space_to_depth(video, spatial=2, temporal=2).reshape(1, 12, 16))


def test_the_convolution_of_one_pixel():
    image = normal(1, 6, 6, 3)
    config = IMAGE | dict(prep_type="conv1x1", num_channels=4, spatial_downsample=2)
    variables, out = prepare(config, image)
    conv = variables["params"]["conv1x1"]
    np.testing.assert_allclose(
        out.features, image[:, ::2, ::2].reshape(1, 9, 3) @ conv["kernel"][0, 0] + conv["bias"], atol=1e-5
    )
    video = jnp.stack([image, -image], axis=1)
    _, both = prepare(config | dict(positions=None), video, variables)
    np.testing.assert_allclose(both.rows[:, :9], out.features, atol=1e-6)


@pytest.mark.parametrize("variant", ["deepmind", "hf"])
def test_the_convolutional_stem(variant):
    image = normal(2, 16, 16, 3)
    config = IMAGE | dict(prep_type="conv", spatial_downsample=4, num_channels=4, variant=variant)
    variables, out = prepare(config, image)
    params, stats = variables["params"], variables["batch_stats"]["bn"]
    # Pixels around the image are zero: 2 above and 3 below, or 3 and 3. The pool's window of 3 starts at every second.
    before, side = (2, 4) if variant == "deepmind" else (3, 3)
    padded = np.pad(image, [(0, 0), (before, 3), (before, 3), (0, 0)])
    x = np.stack(
        [
            [
                np.einsum("bhwc,hwco->bo", padded[:, i : i + 7, j : j + 7], params["conv"]["kernel"])
                for j in range(0, 16, 2)
            ]
            for i in range(0, 16, 2)
        ]
    ).transpose(2, 0, 1, 3)
    batch_mean = x.mean((0, 1, 2))
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["bn"]["scale"] + params["bn"]["bias"]
    x = np.maximum(x, 0)
    wanted = np.stack(
        [[x[:, i : i + 3, j : j + 3].max((1, 2)) for j in range(0, 2 * side, 2)] for i in range(0, 2 * side, 2)]
    ).transpose(2, 0, 1, 3)
    assert out.index_dims == (side, side)
    np.testing.assert_allclose(out.features, wanted.reshape(2, -1, 4), atol=1e-4)

    # In training, statistics are the batch's and move by a tenth.
    module = build(config)
    _, state = module.apply(variables, image, train=True, mutable=["batch_stats"])
    moved = 0.9 * stats["mean"] + 0.1 * batch_mean
    np.testing.assert_allclose(state["batch_stats"]["bn"]["mean"], moved, atol=1e-5)


def test_sixteen_fold_downsampling_has_two_stages_of_convolution():
    image = normal(1, 32, 32, 1)
    config = IMAGE | dict(prep_type="conv", spatial_downsample=16, num_channels=2, use_batchnorm=False)
    variables, out = prepare(config, image)
    assert set(variables["params"]) == {"conv", "conv_1"} and out.index_dims == (2, 2)
    variables, out = prepare(config | dict(variant="hf"), image)
    assert set(variables["params"]) == {"conv"} and out.index_dims == (7, 7)


def test_positions_are_added_or_deepened():
    image = normal(1, 2, 3, 4)
    trained = dict(name="trainable_positions", features=4)
    variables, out = prepare(IMAGE | dict(concat_or_add_pos="add", positions=trained), image)
    np.testing.assert_allclose(out.rows - out.features, variables["params"]["pos_embs"][None], atol=1e-6)
    config = IMAGE | dict(concat_or_add_pos="add", positions=trained, n_extra_pos_mlp=2)
    variables, out = prepare(config, image)
    p = variables["params"]
    e = p["pos_embs"]
    e = nn.relu(e + e @ p["pos_mlp_0"]["kernel"] + p["pos_mlp_0"]["bias"])
    e = e + e @ p["pos_mlp_1"]["kernel"] + p["pos_mlp_1"]["bias"]
    np.testing.assert_allclose(out.rows - out.features, e[None], atol=1e-5)


# Text, audio, labels


def test_text_is_embedded_and_may_be_shorter_than_the_table():
    text = dict(name="text_preprocessor", vocab_size=9, max_positions=6, features=4)
    ids = jnp.array([[3, 1, 8, 3]])
    variables, out = prepare(text, ids)
    table, positions = variables["params"]["token_embed"]["embedding"], variables["params"]["pos_embs"]
    assert table.shape == (9, 4) and positions.shape == (6, 4)
    np.testing.assert_allclose(out.rows[0], table[ids[0]] + positions[:4], atol=1e-6)
    with pytest.raises(UsageError, match="the text has 7 tokens but max_positions is 6"):
        prepare(text, jnp.zeros((1, 7), int))
    wide = build(text | dict(vocab_size=300, features=100))
    drawn = nn.unbox(wide.init(jax.random.key(0), ids))["params"]
    np.testing.assert_allclose(drawn["token_embed"]["embedding"].std(), 0.8796, rtol=0.02)
    np.testing.assert_allclose(drawn["pos_embs"].std(), 0.8796 * 0.02, rtol=0.1)


def test_audio_is_cut_into_patches():
    audio = normal(2, 12, 1)
    config = dict(name="audio_preprocessor", samples_per_patch=4, positions=FOURIER | dict(max_resolution=(12,)))
    _, out = prepare(config, audio)
    np.testing.assert_array_equal(out.rows[0, 1, :4], audio[0, 4:8, 0])
    np.testing.assert_allclose(out.rows[1, :, 4:], FourierPositions(3, (12,)).grid((3,)), atol=1e-7)
    with pytest.raises(UsageError, match="12 audio samples do not split into patches of 5"):
        prepare(config | dict(samples_per_patch=5), audio)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        (dict(prep_type="convolve"), (1, 8, 8, 3), "prep_type 'convolve' is none of pixels, patches, conv, conv1x1"),
        (
            dict(prep_type="conv", spatial_downsample=8),
            (1, 8, 8, 3),
            "spatial_downsample is 8: 'conv' needs 4 for one stage or another power of 4",
        ),
        (dict(prep_type="conv"), (1, 8, 8, 3), "spatial_downsample is 1: 'conv' needs 4 for one stage"),
        (dict(prep_type="conv", spatial_downsample=0), (1, 8, 8, 3), "spatial_downsample is 0 .*: give 1 or more"),
        (dict(spatial_downsample=-1), (1, 8, 8, 3), "spatial_downsample is -1 .*: give 1 or more"),
        (dict(temporal_downsample=0), (1, 2, 8, 8, 3), "temporal_downsample 0: give 1 or more"),
        (
            dict(prep_type="conv", temporal_downsample=2),
            (1, 2, 8, 8, 3),
            "temporal_downsample is 2 but 'conv' keeps every",
        ),
        (dict(prep_type="patches", spatial_downsample=3), (1, 8, 8, 3), r"blocks of \(3, 3\) do not divide"),
        (dict(concat_or_add_pos="multiply"), (1, 8, 8, 3), "concat_or_add_pos 'multiply' is none of concat, add"),
        (dict(concat_or_add_pos="add"), (1, 8, 8, 3), "features have 3 channels and positions 14"),
        (dict(variant="torch", prep_type="conv1x1"), (1, 8, 8, 3), "variant 'torch' is none of deepmind, hf"),
        (dict(), (1, 2, 8, 8, 3), r"max_resolution \(8, 8\) has 2 axes but the input has 3"),
    ],
)
def test_what_does_not_fit_is_named(changes, shape, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(build(IMAGE | changes).init, jax.random.key(0), jnp.zeros(shape))


# Several modalities

MODALITIES = dict(
    sound=dict(name="audio_preprocessor", samples_per_patch=2),
    picture=IMAGE | dict(positions=None),
    kind=dict(name="one_hot_preprocessor"),
)
BOTH = dict(name="multimodal_preprocessor", modalities=MODALITIES, min_padding_size=1)
INPUTS = dict(sound=normal(2, 6, 1), picture=normal(2, 2, 2, 3, seed=1), kind=normal(2, 5, seed=2))


def test_modalities_are_padded_and_joined_in_the_order_of_their_names():
    variables, out = prepare(BOTH, INPUTS)
    params = variables["params"]
    assert jax.tree.map(jnp.shape, params) == dict(kind_padding=(1, 1), picture_padding=(1, 3), sound_padding=(1, 4))
    assert out.rows.shape == (2, 1 + 4 + 3, 6) and list(out.parts) == ["kind", "picture", "sound"]
    np.testing.assert_array_equal(out.rows[:, 0, :5], INPUTS["kind"])
    np.testing.assert_array_equal(out.rows[:, 1:5, :3], INPUTS["picture"].reshape(2, 4, 3))
    np.testing.assert_array_equal(out.rows[:, 5:, :2], INPUTS["sound"].reshape(2, 3, 2))
    np.testing.assert_array_equal(out.rows[1, 6, 2:], params["sound_padding"][0])
    for inputs in (INPUTS["sound"], {"sound": INPUTS["sound"]}, INPUTS | dict(touch=INPUTS["kind"])):
        with pytest.raises(
            UsageError, match="inputs (are for .*|must name their .*): give a dict for kind, picture, s"
        ):
            build(BOTH).init(jax.random.key(0), inputs)


def test_masked_rows_are_tokens():
    probs = dict(sound=0.0, picture=0.5, kind=1.0)
    masking = BOTH | dict(mask_probs=dict(sound=0.0, picture=0.0, kind=1.0), train_mask_probs=probs)
    variables, out = prepare(masking, INPUTS)  # certain masks need no rng
    plain = prepare(BOTH, INPUTS, {"params": {k: v for k, v in variables["params"].items() if "mask" not in k}})[1]
    token = variables["params"]["kind_mask_token"]
    assert token.shape == (1, 6) and "sound_mask_token" in variables["params"]
    np.testing.assert_array_equal(out.rows[:, 0], jnp.concatenate([token, token]))  # padding is masked too
    np.testing.assert_array_equal(out.rows[:, 1:], plain.rows[:, 1:])

    many = INPUTS | dict(picture=normal(2, 20, 20, 3))
    plain = prepare(BOTH, many, {"params": {k: v for k, v in variables["params"].items() if "mask" not in k}})[1]
    _, out = prepare(masking, many, variables, train=True, rngs={"dropout": jax.random.key(0)})
    masked = (out.rows == variables["params"]["picture_mask_token"]).all(-1)[:, 1:401]
    assert 0.4 < masked.mean() < 0.6 and (masked[0] != masked[1]).any()
    np.testing.assert_array_equal(out.rows[:, 1:401][~masked], plain.rows[:, 1:401][~masked])
    with pytest.raises(UsageError, match="mask_probs of picture is 0.5: pass a 'dropout' rng"):
        prepare(masking, many, variables, train=True)
    with pytest.raises(UsageError, match=r"mask_probs are for \['kind'\]"):
        prepare(BOTH | dict(mask_probs=dict(kind=1.0)), INPUTS)
    for prob in (-0.5, 1.5):
        with pytest.raises(UsageError, match=f"mask_probs of kind is {prob}: give a probability from 0 to 1"):
            prepare(masking | dict(mask_probs=probs | dict(kind=prob)), INPUTS, variables)


# Postprocessors


def test_linear_postprocessors_have_their_parameters_to_themselves():
    config = dict(
        name="multimodal_postprocessor",
        modalities=dict(
            sound=dict(name="audio_postprocessor", samples_per_patch=4),
            kind=dict(name="projection_postprocessor", features=5),
        ),
    )
    rows = dict(sound=normal(2, 3, 6), kind=normal(2, 6, seed=1))
    variables, out = prepare(config, rows)
    p = variables["params"]
    assert jax.tree.map(jnp.shape, p["sound"]) == dict(kernel=(6, 4), bias=(4,))
    np.testing.assert_allclose(
        out["sound"], (rows["sound"] @ p["sound"]["kernel"] + p["sound"]["bias"]).reshape(2, 12, 1), atol=1e-5
    )
    np.testing.assert_allclose(out["kind"], rows["kind"] @ p["kind"]["kernel"] + p["kind"]["bias"], atol=1e-5)
    drawn = nn.unbox(build(config).init(jax.random.key(0), dict(sound=normal(1, 3, 400), kind=normal(1, 400))))
    kernel = drawn["params"]["sound"]["kernel"]
    np.testing.assert_allclose(kernel.std(), 0.8796 / 20, rtol=0.05)


def test_images_are_put_together_again():
    image = normal(2, 4, 6, 3)
    cells = space_to_depth(image, spatial=2)
    config = dict(name="image_postprocessor", postproc_type="patches", spatial_upsample=2, input_reshape_size=(2, 3))
    np.testing.assert_array_equal(prepare(config, cells.reshape(2, 6, 12))[1], image)
    video = normal(2, 2, 4, 6, 3)
    cells = space_to_depth(video, spatial=2, temporal=2)
    both = config | dict(temporal_upsample=2, input_reshape_size=None)
    np.testing.assert_array_equal(prepare(both, cells)[1], video)
    np.testing.assert_array_equal(prepare(dict(name="image_postprocessor"), video)[1], video)


@pytest.mark.parametrize(
    ("rows", "options", "shape", "widths"),
    [
        ((1, 3, 4, 5), dict(spatial_upsample=4), (1, 12, 16, 2), dict(conv_0=(4, 4, 5, 4), conv_1=(4, 4, 4, 2))),
        (
            (1, 2, 3, 4, 5),
            dict(spatial_upsample=4),
            (1, 2, 12, 16, 2),
            dict(conv_0=(4, 4, 5, 4), conv_1=(4, 4, 4, 2)),
        ),
        (
            (1, 2, 3, 4, 5),
            dict(temporal_upsample=2, spatial_upsample=4),
            (1, 4, 12, 16, 2),
            dict(conv_0=(4, 4, 4, 5, 4), conv_1=(4, 4, 4, 4, 2)),
        ),
    ],
)
def test_transposed_convolutions_enlarge(rows, options, shape, widths):
    config = dict(name="image_postprocessor", postproc_type="conv", features=2, **options)
    x = normal(*rows)
    variables, out = prepare(config, x)
    assert out.shape == shape
    assert {name: leaf["kernel"].shape for name, leaf in variables["params"].items()} == widths
    # No activation follows the last layer, and without a factor for time frames are independent.
    doubled = jax.tree.map(lambda leaf: leaf, variables)
    doubled["params"]["conv_1"] = jax.tree.map(lambda leaf: 2 * leaf, variables["params"]["conv_1"])
    np.testing.assert_allclose(prepare(config, x, doubled)[1], 2 * out, rtol=1e-4, atol=1e-5)
    if len(rows) == 5 and "temporal_upsample" not in options:
        np.testing.assert_allclose(prepare(config, x[:, :1], variables)[1], out[:, :1], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(postproc_type="raft"), "postproc_type 'raft' is none of"),
        (dict(postproc_type="conv"), "'conv' needs the number of output channels: set features"),
        (dict(spatial_upsample=2), r"'pixels' cannot enlarge by \(1, 2\)"),
        (
            dict(postproc_type="conv", features=2, spatial_upsample=8),
            "spatial_upsample is 8: 'conv' without time enlarges by 4",
        ),
        (dict(postproc_type="conv", features=2), "spatial_upsample is 1: 'conv' without time enlarges by 4"),
        (
            dict(postproc_type="conv", features=2, temporal_upsample=2, spatial_upsample=3),
            r"'conv' cannot enlarge by \(2, 3\) in time and space: give powers of 2",
        ),
    ],
)
def test_postprocessors_name_what_is_missing(options, message):
    with pytest.raises(UsageError, match=message):
        build(dict(name="image_postprocessor", **options)).init(jax.random.key(0), normal(1, 3, 4, 5))


def test_encodings_are_plain_values():
    module = build(IMAGE | dict(positions=dict(name="trainable_positions", features=4)), variant="hf")
    assert module.positions == TrainablePositions(4, variant="hf")
