"""CrossViT: its fusions against their equations, what depends on what, and the published sizes."""

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
from xattn.layers.vit import Block, DropPath
from xattn.models import build
from xattn.models.crossvit import VARIANTS
from xattn.ops.resize import bicubic_resize

CONFIG = dict(
    name="crossvit",
    num_classes=5,
    image_sizes=(6, 8),
    patch_sizes=(2, 4),
    features=(8, 12),
    num_heads=(2, 3),
    depths=(1, 1),
    num_stages=1,
    mlp_ratio=2.0,
)
TOKENS = dict(num_classes=0)
THREE = dict(image_sizes=(6, 8, 6), patch_sizes=(2, 4, 3), features=(8, 12, 6), num_heads=(2, 3, 1), depths=(1, 1, 1))
IMAGES = normal(2, 6, 6, 3)


@functools.cache
def variables_of(**changes):
    return random_variables(build(CONFIG | changes), IMAGES)


@functools.cache
def compiled(**changes):
    return jax.jit(build(CONFIG | changes).apply)


def run(variables=None, images=IMAGES, **changes):
    """The output of the small model, changed in some keywords."""
    return np.asarray(compiled(**changes)(variables_of(**changes) if variables is None else variables, images))


def run_and_keep(names, variables, images=IMAGES, **changes):
    """The output, and first arguments and results of the modules of these names."""

    @jax.jit
    def apply(variables, images):
        kept = {}

        def keep(method, args, kwargs, context):
            result = method(*args, **kwargs)
            if context.module.name in names and context.method_name == "__call__":
                kept[context.module.name] = (args[0], result)
            return result

        with nn.intercept_methods(keep):
            return build(CONFIG | changes).apply(variables, images), kept

    return apply(variables, images)


def changed(variables, *path):
    """The same variables but for the leaves below `path`, which are three times as large."""
    path = ("params", *path)

    def change(at, leaf):
        return 3 * leaf if tuple(key.key for key in at[: len(path)]) == path else leaf

    return jax.tree_util.tree_map_with_path(change, variables)


def same(a, b):
    """Which entries of a batch of vectors did not change at all."""
    return (a == b).all(0)


# Fusions


def norm(params, x):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return params["scale"] * x + params["bias"]


def mapped(params, x):
    return jax.nn.gelu(norm(params["norm"], x), approximate=False) @ params["dense"]["kernel"] + params["dense"]["bias"]


def attend(params, heads, query, context):
    return nn.MultiHeadDotProductAttention(heads).apply({"params": params}, query, context)


def cross_attention(params, z):
    fused = []
    for i, o in ((0, 1), (1, 0)):
        asked = mapped(params[f"proj_{i}"], z[i][:, :1])
        normed = norm(params[f"fusion_{i}"]["norm1"], jnp.concatenate([asked, z[o][:, 1:]], 1))
        asked += attend(params[f"fusion_{i}"]["attn"], CONFIG["num_heads"][o], normed[:, :1], normed)
        fused.append(jnp.concatenate([mapped(params[f"revert_{i}"], asked), z[i][:, 1:]], 1))
    return fused


def all_attention(params, z):
    y = jnp.concatenate([mapped(params[f"proj_{i}"], x) for i, x in enumerate(z)], 1)
    normed = norm(params["fusion"]["norm1"], y)
    y += attend(params["fusion"]["attn"], CONFIG["num_heads"][1], normed, normed)
    fine = z[0].shape[1]
    return [mapped(params["revert_0"], y[:, :fine]), mapped(params["revert_1"], y[:, fine:])]


def class_token(params, z):
    total = mapped(params["proj_0"], z[0][:, :1]) + mapped(params["proj_1"], z[1][:, :1])
    return [jnp.concatenate([mapped(params[f"revert_{i}"], total), x[:, 1:]], 1) for i, x in enumerate(z)]


def pairwise(params, z):
    sides, y = (3, 2), [mapped(params[f"proj_{i}"], x) for i, x in enumerate(z)]
    grids = [x[:, 1:].reshape(len(x), side, side, -1) for x, side in zip(y, sides, strict=True)]
    fused = []
    for i, side in enumerate(sides):
        patches = sum(bicubic_resize(grid, (side, side)) for grid in grids).reshape(len(y[0]), side * side, -1)
        fused.append(mapped(params[f"revert_{i}"], jnp.concatenate([y[0][:, :1] + y[1][:, :1], patches], 1)))
    return fused


@pytest.mark.parametrize("fusion", [cross_attention, all_attention, class_token, pairwise, None])
def test_fusion_is_its_equation(fusion):
    """Of the blocks' outputs, the same ones for both branches: none reads what the other has just written."""
    changes = dict(TOKENS, fusion=fusion.__name__ if fusion else "none")
    variables = variables_of(**changes)
    _, kept = run_and_keep(("branch_0", "branch_1", "stage_0"), variables, **changes)
    z = [kept[f"branch_{i}"][1] for i in (0, 1)]
    expected = jax.jit(fusion)(variables["params"]["stage_0"], z) if fusion else z
    for branch, result in zip(expected, kept["stage_0"][1], strict=True):
        np.testing.assert_allclose(result, branch, atol=2e-5)


def test_fusion_has_the_width_and_the_heads_of_the_other_branch():
    stage = jax.tree.map(lambda x: x.shape, variables_of()["params"]["stage_0"])
    assert stage["fusion_0"]["norm1"]["scale"] == (12,) and stage["fusion_1"]["norm1"]["scale"] == (8,)
    assert stage["fusion_0"]["attn"]["query"]["kernel"] == (12, 3, 4)
    assert stage["fusion_1"]["attn"]["out"]["kernel"] == (2, 4, 8)
    assert stage["proj_0"]["dense"]["kernel"] == (8, 12) and stage["revert_0"]["dense"]["kernel"] == (12, 8)
    assert set(stage["fusion_0"]) == {"norm1", "attn"}  # no MLP


@pytest.mark.parametrize("part", ["proj", "fusion", "revert"])
def test_a_direction_of_the_fusion_changes_the_class_token_of_its_own_branch_alone(part):
    """Within a stage; the patches pass it as they are."""
    variables = variables_of(**TOKENS)
    for branch, mine in enumerate((slice(0, 8), slice(8, 20))):
        other = changed(variables, "stage_0", f"{part}_{branch}")
        unchanged = same(run(variables, **TOKENS), run(other, **TOKENS))
        assert not unchanged[mine].any() and np.delete(unchanged, mine).all()
        patches = dict(TOKENS, pool="mean")
        np.testing.assert_array_equal(run(variables, **patches), run(other, **patches))


def test_the_old_class_token_has_no_residual():
    """With silent maps back, what a branch passes on is the bias of its map."""
    variables = variables_of(**TOKENS)
    stage = variables["params"]["stage_0"]
    silent = {f"revert_{i}": jax.tree.map(jnp.zeros_like, stage[f"revert_{i}"]) for i in (0, 1)}
    variables = {"params": variables["params"] | {"stage_0": stage | silent}}
    _, kept = run_and_keep(("stage_0",), variables, **TOKENS)
    for branch in kept["stage_0"][1]:
        assert not branch[:, 0].any() and branch[:, 1:].any()


def test_three_branches_are_a_ring():
    """In one stage a branch hears of itself and of the next one."""
    changes = TOKENS | THREE
    variables = variables_of(**changes)
    before, bounds = run(variables, **changes), (0, 8, 20, 26)
    assert before.shape == (2, 26)
    for j in range(3):
        unchanged = same(before, run(changed(variables, f"patch_embed_{j}"), **changes))
        hears = [not unchanged[bounds[i] : bounds[i + 1]].all() for i in range(3)]
        assert hears == [i == j or (i + 1) % 3 == j for i in range(3)]
    shapes = jax.tree.map(lambda x: x.shape, variables["params"]["stage_0"])
    assert [shapes[f"fusion_{i}"]["norm1"]["scale"] for i in range(3)] == [(12,), (6,), (8,)]


def test_branches_without_fusion_meet_in_the_logits_alone():
    changes = dict(fusion="none", num_classes=0)
    variables = variables_of(**changes)
    unchanged = same(run(variables, **changes), run(changed(variables, "patch_embed_1"), **changes))
    assert unchanged[:8].all() and not unchanged[8:].any()


# Inputs and outputs


def test_images_of_a_batch_do_not_meet():
    together = run()
    np.testing.assert_allclose(run(images=IMAGES[::-1]), together[::-1], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_logits_are_the_mean_of_the_heads_and_classes_can_be_permuted():
    variables = variables_of()
    params, tokens = variables["params"], run(variables, num_classes=0)
    heads = [
        part @ params[f"head_{i}"]["kernel"] + params[f"head_{i}"]["bias"]
        for i, part in enumerate((tokens[:, :8], tokens[:, 8:]))
    ]
    np.testing.assert_allclose(run(variables), (heads[0] + heads[1]) / 2, atol=1e-5)
    order = np.array([3, 0, 4, 1, 2])
    permuted = {f"head_{i}": jax.tree.map(lambda x: x[..., order], params[f"head_{i}"]) for i in (0, 1)}
    np.testing.assert_array_equal(run({"params": params | permuted}), run(variables)[:, order])


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_without_classes_the_normalised_tokens_come_out(pool):
    variables = variables_of(num_classes=0)
    assert not any(name.startswith("head") for name in variables["params"])
    out, kept = run_and_keep(("norm_0", "norm_1"), variables, num_classes=0, pool=pool)
    for i, part in enumerate((out[:, :8], out[:, 8:])):
        tokens, normed = kept[f"norm_{i}"]
        expected = norm(variables["params"][f"norm_{i}"], tokens)
        np.testing.assert_allclose(normed, expected, atol=1e-5)
        expected = expected[:, 0] if pool == "token" else expected[:, 1:].mean(1)
        np.testing.assert_allclose(part, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (11, 5)])
def test_each_branch_resizes_the_image_that_came_in(size):
    """To its own size, and not what another branch made of it; patches follow one another row by row."""
    images, variables = normal(2, *size, 3), variables_of(fusion="none")
    _, kept = run_and_keep(("patch_embed_0", "patch_embed_1"), variables, images, fusion="none")
    for i, (side, patch) in enumerate(zip(CONFIG["image_sizes"], CONFIG["patch_sizes"], strict=True)):
        seen, tokens = kept[f"patch_embed_{i}"]
        np.testing.assert_allclose(seen, bicubic_resize(images, (side, side)), atol=1e-6)
        if size == (side, side):
            np.testing.assert_array_equal(seen, images)
        grid = side // patch  # its second row begins with token `grid`
        params = variables["params"][f"patch_embed_{i}"]["proj"]
        expected = np.einsum("bhwc,hwcd->bd", seen[:, patch : 2 * patch, :patch], params["kernel"]) + params["bias"]
        np.testing.assert_allclose(tokens[:, grid], expected, atol=1e-5)


def test_weights_of_the_fusion_are_sown_when_asked_for():
    model = build(CONFIG)
    logits, state = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(variables_of(), IMAGES)
    np.testing.assert_allclose(logits, run(), atol=1e-5)
    for i, shape in enumerate([(2, 3, 1, 5), (2, 2, 1, 10)]):
        (weights,) = state["intermediates"]["stage_0"][f"fusion_{i}"]["attn"]["attention_weights"]
        assert weights.shape == shape
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert set(jax.eval_shape(model.init, jax.random.key(0), IMAGES)) == {"params"}


# Training


def test_rates_of_drop_path_are_the_published_ones():
    """Those of crossvit_9 at 0.1: a branch takes the first rates of its stage, the fusion the last."""
    model = build(CONFIG | dict(num_stages=3, depths=(1, 3), drop_path_rate=0.1))
    rates = {}

    def keep(method, args, kwargs, context):
        if isinstance(context.module, DropPath):
            rates["/".join(context.module.path[:-1])] = context.module.rate
        return method(*args, **kwargs)

    with nn.intercept_methods(keep):
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        jax.eval_shape(functools.partial(model.init, train=True), keys, IMAGES)
    expected = {}
    for k, (large, fusion) in enumerate(
        [((0, 0.0125, 0.025), 0.025), ((0.0375, 0.05, 0.0625), 0.0625), ((0.075, 0.0875, 0.1), 0.1)]
    ):
        expected[f"stage_{k}/branch_0/block_0"] = large[0]
        expected |= {f"stage_{k}/branch_1/block_{j}": rate for j, rate in enumerate(large)}
        expected |= {f"stage_{k}/fusion_{i}": fusion for i in (0, 1)}
    assert rates == pytest.approx(expected)


def test_drop_path_drops_examples_as_a_whole_and_keeps_the_mean():
    x = normal(4000, 2, 3)
    layer = DropPath(0.25)
    out = layer.apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(out != 0).all((1, 2))
    np.testing.assert_allclose(out[kept], x[kept] / 0.75, rtol=1e-6)
    assert not out[~kept].any()
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / 4000)
    np.testing.assert_array_equal(layer.apply({}, x, deterministic=True), x)


def test_both_residuals_of_a_block_drop_on_their_own():
    """Of the same example four different ones come out, each about as often as the others."""
    x = jnp.broadcast_to(normal(1, 3, 8), (400, 3, 8))
    block = Block(2, drop_path_rate=0.5)
    out = block.apply(random_variables(block, x), x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    _, counts = np.unique(np.asarray(out[:, 0, 0]).round(4), return_counts=True)
    assert len(counts) == 4 and counts.min() > 70


@pytest.mark.parametrize("rate", ["drop_path_rate", "dropout_rate", "attention_dropout_rate", "head_dropout_rate"])
def test_dropout_is_for_training_alone(rate):
    model = build(CONFIG | {rate: 0.5, "depths": (1, 2)})
    variables = variables_of(depths=(1, 2))
    train = jax.jit(functools.partial(model.apply, train=True))
    outs = [train(variables, IMAGES, rngs={"dropout": jax.random.key(seed, impl="rbg")}) for seed in (0, 1)]
    assert np.abs(outs[0] - outs[1]).max() > 1e-3
    # Where it does not train, there is nothing to compile that differs.
    evaluation = [
        str(jax.make_jaxpr(build(CONFIG | keywords).apply)(variables_of(), IMAGES)) for keywords in ({rate: 0.5}, {})
    ]
    assert evaluation[0] == evaluation[1]


def test_first_values():
    """Dense layers, class tokens and positions are normal, convolutions and their biases uniform as in torch."""
    sizes = dict(image_sizes=(48, 64), patch_sizes=(12, 16), features=(64, 128), num_heads=(2, 2), stem="conv")
    init = jax.jit(build(CONFIG | sizes).init)
    params = meta.unbox(init(jax.random.key(0, impl="rbg"), normal(1, 48, 48, 3)))["params"]
    stage = params["stage_0"]
    for leaf in (
        stage["branch_1"]["block_0"]["mlp"]["fc1"]["kernel"],
        stage["branch_1"]["block_0"]["attn"]["out"]["kernel"],
        stage["fusion_0"]["attn"]["key"]["kernel"],
        stage["revert_1"]["dense"]["kernel"],
        params["pos_embed_1"],
    ):
        assert np.std(leaf) == pytest.approx(0.02, rel=0.05) and np.abs(leaf).max() > 0.05
    assert np.std(params["cls_token_1"]) == pytest.approx(0.02, rel=0.3)
    assert not stage["branch_1"]["block_0"]["mlp"]["fc1"]["bias"].any() and not params["head_0"]["bias"].any()
    for index, fan_in in enumerate((7 * 7 * 3, 3 * 3 * 32, 3 * 3 * 64)):
        conv, bound = params["patch_embed_1"][f"conv_{index}"], fan_in**-0.5
        for leaf in conv.values():
            assert 0.8 * bound < np.abs(leaf).max() <= bound
        assert np.std(conv["kernel"]) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_half_precision_gives_logits_in_single_precision():
    logits = run(variables_of(), dtype="bfloat16")
    assert logits.dtype == np.float32
    assert 1e-5 < np.abs(logits - run()).max() < 0.1


# Sizes

PUBLISHED = {
    "tiny_240": 7_014_800,
    "small_240": 26_856_272,
    "base_240": 105_025_232,
    "9_240": 8_553_296,
    "15_240": 27_528_464,
    "18_240": 43_271_408,
    "9_dagger_240": 8_776_592,
    "15_dagger_240": 28_209_008,
    "18_dagger_240": 44_266_976,
    "15_dagger_408": 28_500_080,
    "18_dagger_408": 44_606_560,
    "18_dagger_504": 44_887_904,
}


QUICK = ("tiny_240", "9_240", "9_dagger_240")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in VARIANTS]
)
def test_published_numbers_of_parameters(name):
    shapes = jax.eval_shape(build(dict(name=f"crossvit_{name}")).init, jax.random.key(0), normal(1, 8, 8, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]


def multiply_adds(image_sizes, widths, depths, ratio):
    """The formula of a whole network with a dagger, without norms and the resize."""
    total, tokens = 0, [1 + (size // patch) ** 2 for size, patch in zip(image_sizes, (12, 16), strict=True)]
    for i, (size, patch, width) in enumerate(zip(image_sizes, (12, 16), widths, strict=True)):
        other, asked, grid = widths[1 - i], tokens[1 - i], size // patch
        first, second = size // 4, grid if patch == 12 else size // 8
        total += first**2 * 49 * 3 * width // 4 + second**2 * 9 * width // 4 * width // 2
        total += grid**2 * 9 * width // 2 * width
        block = tokens[i] * (4 + 2 * ratio) * width**2 + 2 * tokens[i] ** 2 * width
        fusion = 2 * width * other + 2 * other**2 + 2 * asked * other**2 + 2 * asked * other
        total += 3 * (depths[i] * block + fusion) + width * 1000
    return total


def test_published_multiply_adds():
    """Only the class tokens ask in the fusions: with all tokens it would be much more."""
    model, images = build(dict(name="crossvit_9_dagger_240")), jax.ShapeDtypeStruct((1, 240, 240, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    # The published count projects all keys and values, as is done when weights are looked at.
    flops = count_flops(functools.partial(model.apply, mutable=["intermediates"]), variables, images)
    assert flops.total() == 2 * multiply_adds((240, 224), (128, 256), (1, 3), 3)
    assert flops.total() / 2e9 == pytest.approx(1.979, abs=6e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_sizes=(6, 9)), "patches of 4 .* image of 9"),
        (dict(image_sizes=(7, 8)), "patches of 2 .* image of 7"),
        (dict(depths=(1, 2, 1)), r"depths \(1, 2, 1\)"),
        (dict(num_heads=(3, 3)), "num_heads 3|divi"),
        (dict(fusion="cross"), "fusion 'cross'.*cross_attention"),
        (dict(pool="max"), "pool 'max'.*token.*mean"),
        (dict(stem="conv"), "conv.* 2 x 2.*12 or 16"),
        (dict(stem="t2t"), "stem 't2t'.*linear"),
        ({name: CONFIG[name][:1] for name, value in CONFIG.items() if isinstance(value, tuple)}, "two branches"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(build(CONFIG | changes).init, jax.random.key(0), IMAGES)
