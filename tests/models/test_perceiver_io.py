"""Perceiver IO: published sizes, sharing of weights, masks, queries in parts, and what can be seen inside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from tests.variables import normal, random_variables
from xattn.analysis import count_flops
from xattn.config import UsageError
from xattn.layers.perceiver import CrossAttend, SelfAttend
from xattn.layers.positions import FourierPositions
from xattn.models import build
from xattn.models.perceiver_io import VARIANTS, Queries
from xattn.parallel.mesh import RULES

ENCODER = dict(
    name="perceiver_encoder",
    num_latents=5,
    latent_features=16,
    num_blocks=2,
    num_self_attends_per_block=1,
    num_self_heads=4,
)
DEEP = dict(num_blocks=3, num_self_attends_per_block=2)
TEXT = dict(
    name="perceiver_io",
    input_preprocessor=dict(name="text_preprocessor", vocab_size=20, max_positions=12, features=8),
    encoder=ENCODER | dict(num_cross_heads=2, qk_features=8, v_features=16),
    decoder=dict(
        name="perceiver_decoder",
        queries=dict(name="queries", index_dims=(12,), positions=dict(name="trainable_positions", features=8)),
        num_heads=2,
        qk_features=4,
        v_features=8,
    ),
    embedding_decoder=dict(name="embedding_decoder"),
)
FOURIER = dict(name="fourier_positions", num_bands=3, max_resolution=(8, 8))
IMAGE = dict(
    name="perceiver_io",
    input_preprocessor=dict(name="image_preprocessor", positions=FOURIER),
    encoder=ENCODER,
    decoder=dict(
        name="perceiver_decoder",
        queries=dict(name="queries", positions=dict(name="trainable_positions", features=8)),
        output_features=7,
        use_query_residual=True,
    ),
)
FLOW = dict(
    name="perceiver_io",
    input_preprocessor=dict(name="image_preprocessor", prep_type="patches", temporal_downsample=2, positions=FOURIER),
    encoder=ENCODER,
    decoder=dict(
        name="perceiver_decoder",
        queries=dict(name="queries"),
        output_features=2,
        zero_output=True,
        rescale_factor=100.0,
    ),
)
SOUND = dict(name="fourier_positions", num_bands=4, max_resolution=(12,))
MULTIMODAL = dict(
    name="perceiver_io",
    input_preprocessor=dict(
        name="multimodal_preprocessor",
        modalities=dict(
            sound=dict(name="audio_preprocessor", samples_per_patch=2, positions=SOUND),
            picture=dict(name="image_preprocessor", positions=FOURIER),
            kind=dict(name="one_hot_preprocessor"),
        ),
        mask_probs=dict(sound=0.0, picture=0.0, kind=1.0),
    ),
    encoder=ENCODER,
    decoder=dict(
        name="perceiver_decoder",
        queries=dict(
            sound=dict(name="queries", index_dims=(6,), positions=SOUND),
            picture=dict(name="queries", index_dims=(4, 3), positions=FOURIER),
            kind=dict(name="queries", positions=dict(name="trainable_positions", features=10)),
        ),
        output_features=9,
    ),
    output_postprocessor=dict(
        name="multimodal_postprocessor",
        modalities=dict(
            sound=dict(name="audio_postprocessor", samples_per_patch=2),
            picture=dict(name="projection_postprocessor", features=3),
            kind=dict(name="projection_postprocessor", features=5),
        ),
    ),
)
IDS = jnp.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
PIXELS = normal(2, 4, 3, 3)
FRAMES = normal(2, 2, 4, 3, 27)
CLIP = dict(sound=normal(2, 12, 1), picture=normal(2, 4, 3, 3, seed=1), kind=normal(2, 5, seed=2))
EXAMPLES = {"text": (TEXT, IDS), "image": (IMAGE, PIXELS), "flow": (FLOW, FRAMES), "clip": (MULTIMODAL, CLIP)}


def changed(config, **parts):
    """The config with some keywords of its parts changed."""
    return config | {name: config[name] | changes for name, changes in parts.items()}


@functools.cache
def variables_of(example):
    config, inputs = EXAMPLES[example]
    return random_variables(build(config), inputs)


def run(config, variables, *args, mutable=False, method=None, **kwargs):
    apply = functools.partial(build(config).apply, mutable=mutable, method=method)
    return jax.jit(functools.partial(apply, **kwargs))(variables, *args)


# Published sizes

SHAPE = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
PICTURE = SHAPE((1, 224, 224, 3))
BYTES = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
VIDEO = dict(image=SHAPE((1, 16, 224, 224, 3)), audio=SHAPE((1, 30720, 1)), label=SHAPE((1, 700)))
# name: inputs, parameters, GFLOP of a forward pass
SIZES = {
    "language": (BYTES, 201_108_230, 120.9),
    "language_plus_plus": (BYTES, 425_607_430, 240.9),
    "language_sentencepiece": (jax.ShapeDtypeStruct((1, 512), jnp.int32), 223_155_456, None),
    "imagenet_learned": (PICTURE, 62_255_848, 478.0),
    "imagenet_fourier": (PICTURE, 48_440_627, 406.1),
    "imagenet_conv": (PICTURE, 48_646_522, 369.4),
    "optical_flow": (SHAPE((1, 2, 368, 496, 27)), 41_057_134, 1886.7),
    "multimodal": (VIDEO, 19_858_855, 7468.0),
    "perceiver": (PICTURE, 44_912_254, 706.4),
    "perceiver_single_cross_attend": (PICTURE, 42_135_859, 404.0),
}


@functools.cache
def published(name):
    model = build(VARIANTS[name])
    return model, meta.unbox(jax.eval_shape(model.init, jax.random.key(0), SIZES[name][0]))


def test_all_variants_have_published_sizes():
    assert set(SIZES) == set(VARIANTS)


def projected_flops(model, variables, inputs, **options):
    """FLOPs as papers count them, with every key and value projected: as they are when weights are looked at."""
    apply = functools.partial(model.apply, mutable=["intermediates"], **options)
    return count_flops(apply, variables, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    inputs, parameters, gflop = SIZES[name]
    model, variables = published(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    if gflop is not None:
        np.testing.assert_allclose(projected_flops(model, variables, inputs).total() / 1e9, gflop, rtol=0.005)


@pytest.mark.slow
def test_published_work_of_parts():
    model, variables = published("multimodal")
    encode = projected_flops(model, variables, VIDEO, method="encode")
    latents = SHAPE((1, 784, 512))
    decode = projected_flops(model, variables, latents, method="decode")
    np.testing.assert_allclose([encode.total() / 1e9, decode.total() / 1e9], [250, 7218], rtol=0.01)

    model, variables = published("optical_flow")
    flops = projected_flops(model, variables, SIZES["optical_flow"][0])
    parts = ("encoder/cross_attend", "self_attend_", "decoder")
    split = [sum(count for stack, count in flops.items() if part in stack) / 1e9 for part in parts]
    np.testing.assert_allclose(split, [560.7, 360.8, 964.0], rtol=0.001)


@pytest.mark.slow
def test_an_unshared_first_block_is_the_larger_perceiver():
    config = changed(VARIANTS["perceiver"], encoder=dict(share_first_block=False))
    params = jax.eval_shape(build(config).init, jax.random.key(0), PICTURE)["params"]
    np.testing.assert_allclose(sum(leaf.size for leaf in jax.tree.leaves(params)), 82.7e6, rtol=0.001)


def test_a_bigger_answer_costs_no_constants():
    model, variables = published("multimodal")
    jaxpr = jax.make_jaxpr(functools.partial(model.apply, method="decode"))(variables, SHAPE((1, 784, 512)))
    assert sum(np.size(const) for const in jaxpr.consts) < 3e6  # tables of axes; all queries would be 8e8


# Encoder


def encoder_of(**changes):
    return build(ENCODER | DEEP | changes)


@functools.cache
def encoder_variables(**changes):
    return random_variables(encoder_of(**changes), ROWS)


ROWS = normal(2, 7, 6, seed=3)


def layers(params):
    """One pass of the encoder: functions of (z, rows) for its cross-attend and its block."""

    def cross(z, rows):
        return CrossAttend(1).apply({"params": params["cross_attend"]}, z, rows)

    def block(z):
        for i in range(2):
            z = SelfAttend(4).apply({"params": params[f"self_attend_{i}"]}, z)
        return z

    return cross, block


def test_blocks_share_weights_and_add_their_gradients():
    variables = encoder_variables()
    params = variables["params"]
    assert set(params) == {"latents", "cross_attend", "self_attend_0", "self_attend_1"}

    def unrolled(per_block):
        z = jnp.stack([params["latents"]] * 2)
        z = layers(params)[0](z, ROWS)
        for block in per_block:
            z = layers(params | block)[1](z)
        return jnp.sin(z).sum(), z

    def shared(block):
        z = encoder_of().apply({"params": params | block}, ROWS)
        return jnp.sin(z).sum(), z

    block = {name: params[name] for name in ("self_attend_0", "self_attend_1")}
    gradients, wanted = jax.jit(jax.grad(unrolled, has_aux=True))([block] * 3)
    gradient, z = jax.jit(jax.grad(shared, has_aux=True))(block)
    np.testing.assert_allclose(z, wanted, atol=2e-5)
    jax.tree.map(
        lambda g, *parts: np.testing.assert_allclose(g, sum(parts), atol=1e-3, rtol=1e-3), gradient, *gradients
    )


@pytest.mark.parametrize("share_cross", [False, True])
@pytest.mark.parametrize("share_block", [False, True])
def test_the_four_patterns_of_repeated_cross_attends(share_cross, share_block):
    options = dict(repeat_cross_attend=True, share_first_cross_attend=share_cross, share_first_block=share_block)
    variables = encoder_variables(**options)
    params = variables["params"]
    own = set(params.get("repeat", {}))
    assert ("cross_attend" in own) != share_cross and ("self_attend_1" in own) != share_block

    def unrolled(params):
        z = jnp.stack([params["latents"]] * 2)
        for i in range(3):
            cross, block = layers(params if i == 0 else params | params.get("repeat", {}))
            z = block(cross(z, ROWS))
        return jnp.sin(z).sum(), z

    def ours(params):
        z = encoder_of(**options).apply({"params": params}, ROWS)
        return jnp.sin(z).sum(), z

    if share_cross or not share_block:
        (_, wanted), (_, z) = jax.jit(lambda params: (unrolled(params), ours(params)))(params)
    else:  # the published pattern
        both = jax.jit(lambda params: [jax.grad(f, has_aux=True)(params) for f in (unrolled, ours)])(params)
        (wanted_gradient, wanted), (gradient, z) = both
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-3, rtol=2e-3), gradient, wanted_gradient)
    np.testing.assert_allclose(z, wanted, atol=5e-5)


@pytest.mark.parametrize("options", [{}, {"repeat_cross_attend": True}])
def test_layers_may_be_computed_again_in_the_backward_pass(options):
    variables = encoder_variables(**options)

    def loss(variables, remat):
        return jnp.sin(encoder_of(remat=remat, **options).apply(variables, ROWS)).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(variables, False)
    again, same = jax.jit(jax.value_and_grad(loss), static_argnums=1)(variables, True)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), same, gradient)
    residuals = [
        jax.eval_shape(lambda v, remat=remat: jax.vjp(functools.partial(loss, remat=remat), v)[1], variables)
        for remat in (False, True)
    ]
    kept, fewer = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in residuals)
    assert fewer < kept
    dropping = encoder_of(remat=True, dropout_rate=0.5, **options)
    draw = jax.jit(lambda key: dropping.apply(variables, ROWS, train=True, rngs={"dropout": key}))
    assert jnp.abs(draw(jax.random.key(0)) - draw(jax.random.key(1))).max() > 0.1


def test_dropout_differs_between_blocks():
    variables = encoder_variables()
    dropping = encoder_of(dropout_rate=0.5)
    masks = []

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, nn.Dropout) and context.module.path[0].startswith("self"):
            jax.debug.callback(lambda x: masks.append(np.asarray(x) == 0), out)
        return out

    with nn.intercept_methods(record):
        dropping.apply(variables, ROWS, train=True, rngs={"dropout": jax.random.key(0)})
    jax.effects_barrier()
    assert len(masks) == 3 * 2 * 2
    assert len({mask.tobytes() for mask in masks}) == len(masks)


def test_order_of_rows_does_not_matter():
    variables, order = random_variables(build(ENCODER), ROWS), jnp.array([3, 0, 6, 1, 5, 2, 4])
    mask = jnp.array([[True] * 5 + [False] * 2, [False] + [True] * 6])
    encode = jax.jit(functools.partial(build(ENCODER).apply, variables))
    z = encode(ROWS, mask)
    np.testing.assert_allclose(encode(ROWS[:, order], mask[:, order]), z, atol=1e-5)
    assert jnp.abs(encode(ROWS[:, order], mask) - z).max() > 1e-3
    # Pixels carry their coordinates along.
    variables, pixels = variables_of("image"), jnp.arange(12)[::-1]
    pos = jnp.stack(jnp.meshgrid(jnp.linspace(-1, 1, 4), jnp.linspace(-1, 1, 3), indexing="ij"), -1).reshape(1, 12, 2)
    shuffled = PIXELS.reshape(2, 12, 3)[:, pixels].reshape(PIXELS.shape)
    out = run(IMAGE, variables, shuffled, pos=jnp.concatenate([pos[:, pixels]] * 2))
    np.testing.assert_allclose(out, run(IMAGE, variables, PIXELS), atol=1e-4)
    assert jnp.abs(run(IMAGE, variables, shuffled) - out).max() > 1e-3


# Masks


@pytest.mark.parametrize("variant", ["deepmind", "hf"])
def test_padding_changes_nothing(variant):
    config, variables = TEXT | dict(variant=variant), variables_of("text")
    wanted = run(config, variables, IDS[:, :4])
    padded = jnp.concatenate([IDS[:, :4], jnp.full((2, 5), 19)], axis=1)
    out = run(config, variables, padded, jnp.arange(9)[None].repeat(2, 0) < 4)
    np.testing.assert_allclose(out, wanted, atol=2e-5)
    assert jnp.abs(run(config, variables, padded) - wanted).max() > 1e-3


@pytest.mark.parametrize("variant", ["deepmind", "hf"])
def test_padded_queries(variant):
    config, variables = TEXT | dict(variant=variant), variables_of("text")
    mask = jnp.arange(12)[None].repeat(2, 0) < 9
    out, wanted = (run(config, variables, IDS, query_mask=m) for m in (mask, None))
    np.testing.assert_allclose(out[:, :9], wanted[:, :9], atol=1e-5)
    # Without attention and residual a padded row has nothing of its own; transformers' port attends all the same.
    assert (jnp.ptp(out[:, 9:], axis=(0, 1)).max() < 1e-5) == (variant == "deepmind")
    chunked = changed(config, decoder=dict(decode_chunk_size=5))
    np.testing.assert_allclose(run(chunked, variables, IDS, query_mask=mask), out, atol=1e-5)


@pytest.mark.parametrize("variant", ["deepmind", "hf"])
def test_an_example_of_padding_alone_is_finite_in_bfloat16(variant):
    config = TEXT | dict(variant=variant, dtype="bfloat16")
    mask = jnp.stack([jnp.arange(7) < 5, jnp.zeros(7, bool)])

    def loss(variables):
        out = build(config).apply(variables, IDS, mask)
        return (out**2).mean(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(variables_of("text"))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, out)))


def test_bfloat16_agrees_with_float32():
    variables = variables_of("text")
    full, half = (run(TEXT | dict(dtype=dtype), variables, IDS) for dtype in ("float32", "bfloat16"))
    assert half.dtype == jnp.float32
    model = build(TEXT | dict(dtype="bfloat16"))
    assert model.encoder.dtype == model.decoder.dtype == model.embedding_decoder.dtype == "bfloat16"
    np.testing.assert_allclose(half, full, atol=0.03 * jnp.ptp(full))
    assert (full.argmax(-1) == half.argmax(-1)).mean() > 0.9


# Decoding


@pytest.mark.parametrize(("example", "size"), [("text", 5), ("flow", 6), ("clip", 5)])
def test_chunks_decode_to_the_same(example, size):
    config, inputs = EXAMPLES[example]
    variables = variables_of(example)
    chunked = changed(config, decoder=dict(decode_chunk_size=size))
    shapes = jax.tree.map(jnp.shape, meta.unbox(jax.eval_shape(build(chunked).init, jax.random.key(0), inputs)))
    assert shapes == jax.tree.map(jnp.shape, variables)

    if example == "clip":
        outs = [run(c, variables, inputs) for c in (config, chunked)]
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *outs)
        return

    def loss(variables, config):
        out = build(config).apply(variables, inputs)
        return jnp.sin(out).sum(), out

    (wanted_gradient, wanted), (gradient, out) = (
        jax.jit(jax.grad(functools.partial(loss, config=c), has_aux=True))(variables) for c in (config, chunked)
    )
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-3), gradient, wanted_gradient)


def test_chunks_never_hold_all_queries():
    queries = dict(name="queries", index_dims=(64, 64), positions=FOURIER)
    config = changed(IMAGE, decoder=dict(queries=queries, use_query_residual=False, decode_chunk_size=128))
    variables = random_variables(build(config), PIXELS)
    jaxpr = jax.make_jaxpr(build(config).apply)(variables, PIXELS)
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) == 2 * 64 * 64 * 7  # the outputs; one query has 14 channels


def test_one_encoding_serves_many_decodings():
    for example, (config, inputs) in EXAMPLES.items():
        variables = variables_of(example)
        latents = run(config, variables, inputs, method="encode")
        needed = inputs if example == "flow" else None
        out = run(config, variables, latents, needed, method="decode")
        whole = run(config, variables, inputs)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), out, whole)
    with pytest.raises(UsageError, match="queries are made from the inputs: pass inputs to decode too"):
        run(FLOW, variables_of("flow"), latents, method="decode")


def test_chosen_points_are_a_slice_on_the_same_grid():
    points, variables = jnp.array([7, 0, 3, 11]), variables_of("flow")
    whole = run(FLOW, variables, FRAMES).reshape(2, 12, 2)
    np.testing.assert_allclose(run(FLOW, variables, FRAMES, subsampled_points=points), whole[:, points], atol=1e-6)

    decoder = MULTIMODAL["decoder"]
    variables, chosen = variables_of("clip"), dict(picture=points, sound=jnp.array([4, 2]), kind=None)
    for grid in ("inclusive", "exclusive"):
        queries = {name: query | dict(subsampled_grid=grid) for name, query in decoder["queries"].items()}
        config = changed(MULTIMODAL, decoder=dict(queries=queries))
        whole, some = run(config, variables, CLIP), run(config, variables, CLIP, subsampled_points=chosen)
        np.testing.assert_allclose(some["kind"], whole["kind"], atol=1e-6)
        assert whole["picture"].shape == (2, 4, 3, 3) and whole["sound"].shape == (2, 12, 1)
        sliced = whole["picture"].reshape(2, 12, 3)[:, points], whole["sound"].reshape(2, 6, 2)[:, jnp.array([4, 2])]
        for got, wanted in zip((some["picture"], some["sound"].reshape(2, 2, 2)), sliced, strict=True):
            close = jnp.abs(got - wanted).max() < 1e-5
            assert close == (grid == "inclusive")  # the released grid ends short of +1
    chunked = changed(config, decoder=dict(queries=queries, decode_chunk_size=3))
    again = run(chunked, variables, CLIP, subsampled_points=chosen)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), again, some)


def test_queries_are_padded_positions():
    variables = variables_of("clip")
    params = variables["params"]["decoder"]
    assert params["kind_query_embs"].shape == (1, 10)
    # Widths 10, 14 and 9, to 14 + 2.
    assert {name: params[f"{name}_padding"].shape[1] for name in CLIP} == dict(kind=6, picture=2, sound=7)
    seen = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, CrossAttend) and context.module.path[0] == "decoder" and "kv" in kwargs:
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        build(MULTIMODAL).apply(variables, CLIP)
    kind, picture, sound = (x[1] for x in seen)
    np.testing.assert_allclose(kind, jnp.concatenate([params["kind_query_embs"], params["kind_padding"]], -1))
    np.testing.assert_allclose(picture[:, :14], FourierPositions(3, (8, 8)).grid((4, 3)), atol=1e-6)
    np.testing.assert_allclose(sound[3, 9:], params["sound_padding"][0])


def test_a_mask_of_queries_is_cut_by_modality():
    variables = variables_of("clip")
    mask = jnp.ones((2, 1 + 12 + 6), bool).at[:, 1 + 4].set(False).at[:, 1 + 12 + 2].set(False)
    out, plain = (run(MULTIMODAL, variables, CLIP, query_mask=m) for m in (mask, None))
    moved = jax.tree.map(lambda a, b: np.argwhere(jnp.abs(a - b).reshape(2, -1).max(0) > 1e-4).ravel(), out, plain)
    assert not moved["kind"].size
    assert set(moved["picture"] // 3) == {4} and set(moved["sound"] // 2) == {2}


def test_inputs_may_be_part_of_queries():
    queries = dict(name="queries", index_dims=(4, 3), positions=FOURIER, concat_preprocessed_input=True)
    config = changed(IMAGE, decoder=dict(queries=queries, use_query_residual=False))
    variables = random_variables(build(config), PIXELS)
    kernel = variables["params"]["decoder"]["cross_attend"]["attention"]["query"]["kernel"]
    assert kernel.shape[0] == 3 + 14
    whole = run(config, variables, PIXELS)
    assert whole.shape == (2, 4, 3, 7)
    inclusive = changed(config, decoder=dict(queries=queries | dict(subsampled_grid="inclusive")))
    some = run(inclusive, variables, PIXELS, subsampled_points=jnp.array([5, 2]))
    np.testing.assert_allclose(some, whole.reshape(2, 12, 7)[:, jnp.array([5, 2])], atol=1e-5)


def test_the_residual_of_a_query():
    variables = variables_of("image")
    outs = [run(changed(IMAGE, decoder=dict(use_query_residual=flag)), variables, PIXELS) for flag in (True, False)]
    assert jnp.abs(outs[0] - outs[1]).max() > 1e-2
    assert not VARIANTS["imagenet_learned"]["decoder"]["use_query_residual"]
    assert VARIANTS["imagenet_fourier"]["decoder"]["use_query_residual"]


# Beginnings


def test_initial_outputs_and_values():
    flow = build(FLOW)
    variables = meta.unbox(jax.jit(flow.init)(jax.random.key(0), FRAMES))
    assert not run(FLOW, variables, FRAMES).any()
    wide = random_variables(flow, FRAMES)
    raw = run(changed(FLOW, decoder=dict(rescale_factor=1.0)), wide, FRAMES)
    np.testing.assert_allclose(run(FLOW, wide, FRAMES), raw / 100, rtol=1e-5)
    hf = meta.unbox(jax.jit(build(FLOW | dict(variant="hf")).init)(jax.random.key(0), FRAMES))
    assert hf["params"]["decoder"]["output"]["kernel"].any()

    classifier = dict(name="perceiver", input_preprocessor=IMAGE["input_preprocessor"], encoder=ENCODER, num_classes=4)
    variables = meta.unbox(jax.jit(build(classifier).init)(jax.random.key(0), PIXELS))
    assert not run(classifier, variables, PIXELS).any()
    variables = random_variables(build(classifier), PIXELS)
    head = variables["params"]["decoder"]["output"]
    latents = run(classifier, variables, PIXELS, method="encode")
    wanted = latents.mean(1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(run(classifier, variables, PIXELS), wanted, atol=1e-5)

    for variant, std, most in (("deepmind", 0.8796 * 0.02, 0.04), ("hf", 0.02, 0.12)):
        encoder = encoder_of(num_latents=100, latent_features=200, num_self_attends_per_block=1, variant=variant)
        latents = meta.unbox(jax.jit(encoder.init)(jax.random.key(0), ROWS))["params"]["latents"]
        np.testing.assert_allclose(latents.std(), std, rtol=0.02)
        assert 0.9 * std < jnp.abs(latents).max() <= most and (jnp.abs(latents).max() > 0.04) == (variant == "hf")


def test_logits_are_tied_to_the_embedding():
    variables = variables_of("text")
    without = {name: part for name, part in TEXT.items() if name != "embedding_decoder"}
    rows = run(without, {"params": {k: v for k, v in variables["params"].items() if k != "embedding_decoder"}}, IDS)
    table = variables["params"]["input_preprocessor"]["token_embed"]["embedding"]
    wanted = rows @ table.T + variables["params"]["embedding_decoder"]["bias"]
    out = run(TEXT, variables, IDS)
    assert out.shape == (2, 12, 20)
    np.testing.assert_allclose(out, wanted, atol=1e-4)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_parameter_names_its_axes(example):
    config, inputs = EXAMPLES[example]
    boxed = jax.eval_shape(build(config).init, jax.random.key(0), inputs)
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)):
        assert isinstance(leaf, meta.AxisMetadata), leaf
        assert len(leaf.names) == len(leaf.value.shape) and set(leaf.names) <= {None, *dict(RULES)}


# Looking inside


def test_weights_of_every_block_have_a_slot():
    config = changed(TEXT, encoder=DEEP)
    model = build(config)
    variables = random_variables(model, IDS)
    out, state = run(config, variables, IDS, mutable=["intermediates"])
    leaves = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    seen = {f"{path[0].key}/{path[1].key}": leaf for path, leaf in leaves}
    assert {path: leaf.shape for path, leaf in seen.items()} == {
        "encoder/cross_attend": (2, 2, 5, 7),
        "encoder/self_attend_0": (3, 2, 4, 5, 5),
        "encoder/self_attend_1": (3, 2, 4, 5, 5),
        "decoder/cross_attend": (2, 2, 12, 5),
    }
    for leaf in seen.values():
        np.testing.assert_allclose(leaf.sum(-1), 1, rtol=1e-5)
    blocks = seen["encoder/self_attend_1"]
    assert jnp.abs(blocks[0] - blocks[1]).max() > 1e-3
    np.testing.assert_allclose(out, run(config, variables, IDS), atol=1e-5)
    # The same weights from the same layers run one by one.
    params = variables["params"]["encoder"]
    z = jnp.stack([params["latents"]] * 2)
    cross = CrossAttend(2, qk_features=8, v_features=16)
    layer = SelfAttend(4, qk_features=8, v_features=16)
    rows = model.apply(variables, IDS, method=lambda m, x: m.input_preprocessor(x).rows)
    z = cross.apply({"params": params["cross_attend"]}, z, rows)
    for block in range(3):
        for i in range(2):
            z, inner = layer.apply({"params": params[f"self_attend_{i}"]}, z, mutable=["intermediates"])
            (wanted,) = inner["intermediates"]["attention"]["attention_weights"]
            got = seen[f"encoder/self_attend_{i}"][block]
            np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_every_slot_has_its_own_gradient():
    variables, model = variables_of("text"), build(TEXT)
    created = jax.eval_shape(lambda: model.apply(variables, IDS, mutable=["perturbations"])[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), created)

    def loss(perturbations):
        return jnp.sin(model.apply(variables | perturbations, IDS)).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(zeros)
    gradient = gradient["perturbations"]["encoder"]["self_attend_0"]["attention"]["attention_weights"]
    assert gradient.shape == (2, 2, 4, 5, 5)
    assert all(jnp.abs(gradient[i]).max() > 1e-6 for i in range(2))
    # Along one direction in the second block's slot alone.
    direction = jnp.zeros_like(gradient).at[1].set(normal(2, 4, 5, 5))
    step = 1e-2
    compiled = jax.jit(loss)
    slot = zeros["perturbations"]["encoder"]["self_attend_0"]["attention"]

    def at(size):
        slot["attention_weights"] = size * direction
        return compiled(zeros)

    np.testing.assert_allclose((at(step) - at(-step)) / (2 * step), (gradient * direction).sum(), rtol=2e-2, atol=1e-3)
    np.testing.assert_allclose(at(0.0), value, rtol=1e-6)


def test_repeated_passes_have_slots_too():
    config = changed(IMAGE, encoder=DEEP | dict(repeat_cross_attend=True))
    variables = random_variables(build(config), PIXELS)
    _, state = run(config, variables, PIXELS, mutable=["intermediates"])
    encoder = state["intermediates"]["encoder"]
    get = lambda tree, name: tree[name]["attention"]["attention_weights"][0]  # noqa: E731
    assert get(encoder, "cross_attend").shape == (2, 1, 5, 12) and get(encoder, "self_attend_1").shape == (2, 4, 5, 5)
    assert get(encoder["repeat"], "cross_attend").shape == (2, 2, 1, 5, 12)
    assert get(encoder["repeat"], "self_attend_1").shape == (2, 2, 4, 5, 5)


def test_nothing_is_sown_unasked():
    for example, (config, inputs) in EXAMPLES.items():
        model, variables = build(changed(config, decoder=dict(decode_chunk_size=5))), variables_of(example)
        created = jax.eval_shape(functools.partial(model.init, mutable=True), jax.random.key(0), inputs)
        assert set(created) == {"params"}
        unasked, asked = (
            jax.eval_shape(functools.partial(model.apply, mutable=[name]), variables, inputs)[1]
            for name in ("batch_stats", "intermediates")
        )
        assert not unasked
        # When weights are asked for, chunks would tear them apart.
        seen = asked["intermediates"]["decoder"]["cross_attend"]["attention"]["attention_weights"]
        assert [w.shape[-2] for w in seen] == {"text": [12], "image": [1], "flow": [12], "clip": [1, 12, 6]}[example]


# Errors


@pytest.mark.parametrize(
    ("example", "changes", "message"),
    [
        ("image", dict(encoder=dict(num_self_heads=3)), "latent_features 16 is not divisible by num_self_heads 3"),
        (
            "image",
            dict(encoder=dict(v_features=8)),
            "v_features 8 of the self-attends must equal latent_features: set it",
        ),
        ("image", dict(encoder=dict(qk_features=8)), "v_features 8 of the self-attends must equal latent_features"),
        ("image", dict(encoder=dict(num_blocks=0)), "num_blocks is 0: give 1 or more"),
        ("image", dict(encoder=dict(num_self_attends_per_block=0)), "num_self_attends_per_block is 0: give 1 or more"),
        ("image", dict(encoder=dict(num_cross_heads=3)), "qk_features 17 is not divisible by num_heads 3"),
        ("image", dict(decoder=dict(decode_chunk_size=0)), "decode_chunk_size is 0"),
        ("image", dict(encoder=dict(variant="flax")), "variant 'flax' is none of deepmind, hf"),
        ("text", dict(input_preprocessor=dict(max_positions=6)), "the text has 7 tokens but max_positions is 6"),
        (
            "flow",
            dict(decoder=dict(queries=dict(name="queries", subsampled_grid="all"))),
            "query grid 'all' is none of inclusive, exclusive",
        ),
    ],
)
def test_what_does_not_fit_is_named(example, changes, message):
    config, inputs = EXAMPLES[example]
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(build(changed(config, **changes)).init, jax.random.key(0), inputs)


@pytest.mark.parametrize(
    ("example", "given", "message"),
    [
        ("image", dict(query_mask=jnp.ones((2, 9), bool)), r"query_mask has shape \(2, 9\) .* \(2, 1\) queries: give"),
        ("clip", dict(query_mask=jnp.ones((2, 18), bool)), r"query_mask has shape \(2, 18\) .* \(2, 19\) queries"),
        (
            "flow",
            dict(query_mask=jnp.ones((2, 12), bool), subsampled_points=jnp.arange(5)),
            r"query_mask has shape \(2, 12\) .* \(2, 5\) queries",
        ),
        (
            "text",
            dict(input_mask=jnp.ones((2, 1), bool)),
            r"input_mask has shape \(2, 1\) .* \(2, 7\) input rows: give",
        ),
        ("image", dict(pos=jnp.ones((2, 5, 2))), r"pos has shape \(2, 5, 2\) but there are \(2, 12\) input rows"),
        ("clip", dict(pos=dict(picture=jnp.ones((2, 1, 2)))), r"pos has shape \(2, 1, 2\) .* \(2, 12\) input rows"),
        ("clip", dict(pos=dict(image=jnp.ones((2, 12, 2)))), r"pos are for \['image'\]: give a dict for kind, picture"),
        (
            "clip",
            dict(pos=jnp.ones((2, 12, 2))),
            "pos must name their modalities: give a dict for kind, picture, sound",
        ),
        ("clip", dict(subsampled_points=jnp.arange(3)), "subsampled_points must name their modalities: give a dict"),
        (
            "flow",
            dict(subsampled_points=dict(image=jnp.arange(3))),
            r"subsampled_points have 0 axes: give flat indices",
        ),
        ("flow", dict(subsampled_points=jnp.array([[3]])), r"subsampled_points have 2 axes: .* \[n\] of \(4, 3\)"),
        ("flow", dict(subsampled_points=jnp.array([3, 12])), r"from 3 to 12 but the grid \(4, 3\) has 12 .* 0 to 11"),
        (
            "clip",
            dict(subsampled_points=dict(sound=np.array([-1, 2]))),
            r"from -1 to 2 but the grid \(6,\) has 6 points: give indices from 0 to 5",
        ),
    ],
)
def test_arguments_that_do_not_fit_the_inputs(example, given, message):
    config, inputs = EXAMPLES[example]
    with pytest.raises(UsageError, match=message):
        run(config, variables_of(example), inputs, **given)


def test_encode_checks_its_mask_too():
    with pytest.raises(UsageError, match=r"input_mask has shape \(2, 1\) but there are \(2, 7\) input rows"):
        run(TEXT, variables_of("text"), IDS, input_mask=jnp.ones((2, 1), bool), method="encode")


@pytest.mark.parametrize("given", [dict(query_mask=jnp.ones((2, 1), bool)), dict(subsampled_points=jnp.array([0]))])
def test_a_mean_of_latents_has_no_queries(given):
    config = dict(name="perceiver", input_preprocessor=IMAGE["input_preprocessor"], encoder=ENCODER, num_classes=4)
    variables = random_variables(build(config), PIXELS)
    with pytest.raises(UsageError, match="a projection_decoder has no queries: leave out query_mask and"):
        run(config, variables, PIXELS, **given)


def test_memory_is_part_of_every_config():
    remat = {name: config["encoder"]["remat"] for name, config in VARIANTS.items()}
    assert [name for name, flag in remat.items() if flag] == ["optical_flow"]
    chunks = {name: config["decoder"]["decode_chunk_size"] for name, config in VARIANTS.items() if "decoder" in config}
    assert {name: size for name, size in chunks.items() if size} == {"multimodal": 16384}
    assert set(VARIANTS) - set(chunks) == {"perceiver", "perceiver_single_cross_attend"}


def test_names_of_modalities_are_checked():
    with pytest.raises(
        UsageError, match=r"subsampled_points are for \['image'\]: give a dict for kind, picture, sound"
    ):
        run(MULTIMODAL, variables_of("clip"), CLIP, subsampled_points=dict(image=jnp.array([0])))
    with pytest.raises(UsageError, match=r"inputs are for \['kind'\]"):
        run(MULTIMODAL, variables_of("clip"), dict(kind=CLIP["kind"]))


def test_queries_are_plain_values():
    assert build(dict(name="queries")) == Queries()
