"""QSFormer's invariants: what its scores may and may not depend on, what is trained, and published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from tests.variables import normal, random_variables
from xattn.config import UsageError, load_config
from xattn.interop.qsformer import PREPROCESSING, released_parameters
from xattn.models import build
from xattn.models.qsformer import CIFE, VARIANTS, QSFormer, fit_prototypes
from xattn.models.resnet12 import ResNet12
from xattn.ops.emd import emd_scores
from xattn.train.optim import make_optimizer

BACKBONE = dict(name="conv4", widths=(4, 4, 8, 8), num_groups=2, pool_last=False)
ENCODER = dict(name="cife", backbone=BACKBONE, num_heads=2, mlp_dim=16)
CONFIG = dict(
    name="qsformer",
    encoder=ENCODER,
    num_blocks=2,
    patch_num_heads=2,
    mlp_dim=16,
    train_sinkhorn=(0.05, 10),
    eval_sinkhorn=(0.05, 20),
)
N, K, Q = 3, 2, 5


def images(*batch, shots=1):
    return normal(*batch, N, shots, 16, 16, 1), normal(*batch, Q, 16, 16, 1, seed=1)


def maps(*batch, shots=1):
    return normal(*batch, N, shots, 2, 2, 8), normal(*batch, Q, 2, 2, 8, seed=1)


@functools.cache
def variables_of(config=None):
    del config
    return random_variables(build(CONFIG), *images())


def run(method="__call__", *, collections=(), **changes):
    """The compiled `method` of the small model, changed in some keywords, with the same variables."""
    model = build(CONFIG | changes)
    apply = functools.partial(model.apply, method=method, mutable=list(collections) or False)
    return jax.jit(functools.partial(apply, variables_of()))


@pytest.mark.parametrize("projection_norm", ["layer", "l2"])
def test_global_scores_are_the_attention_of_the_queries_to_the_classes(projection_norm):
    support, query = maps(2)
    out, state = run("classify", collections=["intermediates"], projection_norm=projection_norm)(support, query)
    np.testing.assert_allclose(out["global_scores"].sum(-1), 2, rtol=1e-5)
    weights = [state["intermediates"][f"block_{i}"]["attention_weights"][0] for i in range(2)]
    assert weights[0].shape == (2, 1, Q, N)
    np.testing.assert_allclose(sum(weights)[:, 0], out["global_scores"], rtol=1e-5)
    assert weights[0].std() > 0.01 and jnp.abs(weights[0] - weights[1]).max() > 0.01


def test_weights_are_not_sown_at_initialisation_and_can_be_perturbed():
    model, inputs = build(CONFIG), maps()
    shapes = jax.eval_shape(functools.partial(model.init, method="classify"), jax.random.key(0), *inputs)
    assert set(shapes) == {"params"}

    variables, collections = variables_of(), ["perturbations"]
    created = jax.eval_shape(functools.partial(model.apply, method="classify", mutable=collections), variables, *inputs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), created[1]["perturbations"])
    direction = normal(Q, N, seed=2)

    def score(perturbations):
        out = model.apply(variables | {"perturbations": perturbations}, *inputs, method="classify")
        return (direction * out["global_scores"]).sum()

    gradient = jax.jit(jax.grad(score))(zeros)
    # The last block's weights are one of the two summands of the scores, and nothing else depends on them.
    np.testing.assert_allclose(gradient["block_1"]["attention_weights"][0], direction, atol=1e-6)
    assert jnp.abs(gradient["block_0"]["attention_weights"][0] - direction).max() > 1e-4


def test_logits_weigh_the_branches():
    support, query = maps()
    out = run("classify", global_weight=0.3, global_temperature=2.0)(support, query)
    np.testing.assert_allclose(out["logits"], 0.7 * out["local_logits"] + 0.6 * out["global_scores"], rtol=1e-5)
    flat = (out[name].reshape(-1, 4, 8) for name in ("patch_query", "patch_support"))
    np.testing.assert_allclose(out["local_logits"], emd_scores(*flat, epsilon=0.05, iterations=20), rtol=1e-4)


@pytest.mark.parametrize("attn", ["joint", "diagonal"])
def test_order_of_classes_and_queries_carries_over(attn):
    support, query = maps()
    classify = run("classify", query_self_attn=attn)
    out = classify(support, query)
    classes, queries = jnp.array([2, 0, 1]), jnp.array([4, 1, 0, 3, 2])
    permuted = classify(support[classes], query[queries])
    for name in ("logits", "global_scores", "local_logits"):
        np.testing.assert_allclose(permuted[name], out[name][queries][:, classes], atol=2e-5)


def test_only_joint_queries_see_each_other():
    support, query = maps()
    for attn, transductive in (("joint", True), ("diagonal", False)):
        classify = run("classify", query_self_attn=attn)
        together, alone = classify(support, query), classify(support, query[1:3])
        change = jnp.abs(together["global_scores"][1:3] - alone["global_scores"]).max()
        assert (change > 1e-3) == transductive, change
        np.testing.assert_allclose(together["local_logits"][1:3], alone["local_logits"], atol=1e-5)
        assert build(CONFIG | dict(query_self_attn=attn)).transductive == transductive


@pytest.mark.parametrize("axis", ["tokens", "batch"])
def test_features_depend_on_the_batch_only_with_the_batch_axis(axis):
    x = normal(6, 16, 16, 1)
    model = build(CONFIG | dict(encoder=ENCODER | dict(attn_axis=axis), query_self_attn="diagonal"))
    features = run("features", encoder=ENCODER | dict(attn_axis=axis))
    together = features(x)
    alone = jnp.concatenate([features(x[i : i + 1]) for i in range(6)])
    if axis == "tokens":
        np.testing.assert_allclose(together, alone, atol=1e-5)
    else:
        assert jnp.abs(together - alone).max() > 1e-3
    assert model.independent_features == (axis == "tokens")
    assert model.transductive == (axis == "batch")


@pytest.mark.parametrize("axis", ["tokens", "batch"])
def test_episodes_on_leading_axes_are_separate(axis):
    support, query = images(2, shots=K)
    encoder = ENCODER | dict(attn_axis=axis)
    call, features = run(encoder=encoder), run("features", encoder=encoder)
    together = call(support, query)
    rows = jnp.concatenate([support[1].reshape(N * K, 16, 16, 1), query[1]])
    embedded = features(rows)
    alone = run("classify", encoder=encoder)(embedded[: N * K].reshape(N, K, 2, 2, 8), embedded[N * K :])
    for name, value in alone.items():
        np.testing.assert_allclose(together[name][1], value, atol=2e-5)


def test_cife_adds_a_tenth_of_the_decoder_and_keeps_the_other_stages():
    model = build(ENCODER)
    x = normal(2, 16, 16, 1)
    variables = random_variables(model, x)
    captured = functools.partial(model.apply, capture_intermediates=True, mutable=["intermediates"])
    stages, state = jax.jit(captured)(variables, x)
    inner = state["intermediates"]
    backbone = inner["backbone"]["__call__"][0]
    for got, expected in zip(stages[:-1], backbone[:-1], strict=True):
        np.testing.assert_array_equal(got, expected)
    residual = 0.1 * inner["decoder_layer"]["__call__"][0].reshape(2, 2, 2, 8)
    np.testing.assert_allclose(stages[-1], backbone[-1] + residual, rtol=1e-5, atol=1e-6)
    assert inner["decoder_layer"]["cross_attn"]["attention_weights"][0].shape == (2, 2, 4, 4)


@pytest.mark.parametrize("pool_last, kernel", [(True, (4, 4, 8, 8)), (False, (3, 3, 8, 8))])
def test_third_stage_is_brought_to_the_size_of_the_fourth(pool_last, kernel):
    model = build(ENCODER | dict(backbone=BACKBONE | dict(pool_last=pool_last)))
    stages, variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x), jnp.zeros((1, 32, 32, 1))
    )
    assert meta.unbox(variables)["params"]["conv_3"]["kernel"].shape == kernel
    assert stages[-1].shape == ((1, 2, 2, 8) if pool_last else (1, 4, 4, 8))


def test_mean_prototypes_average_the_shots():
    support, query = maps(shots=K)
    classify = run("classify")
    several, one = classify(support, query), classify(support.mean(1, keepdims=True), query)
    np.testing.assert_allclose(several["logits"], one["logits"], atol=1e-5)


def test_fitted_prototypes_lower_the_loss_of_the_support_and_cut_its_gradient():
    support = normal(2, N, K, 4, 8)
    scores = functools.partial(emd_scores, iterations=20)

    @jax.jit
    def losses(support):
        prototypes = fit_prototypes(support, jax.random.key(0), scores, epochs=100)
        rows, labels = support.reshape(2, N * K, 4, 8), jnp.repeat(jnp.arange(N), K)
        return [
            optax.softmax_cross_entropy_with_integer_labels(scores(rows, p), jnp.tile(labels, (2, 1))).mean(-1)
            for p in (support.mean(2), prototypes)
        ]

    before, after = losses(support)
    assert (after < 0.9 * before).all(), (before, after)

    def total(support, query, prototypes):
        model = build(CONFIG | dict(prototypes=prototypes))
        return model.apply(variables_of(), support, query, method="classify")["logits"][:, 0].sum()

    for prototypes, flows in (("mean", True), ("sfc", False)):
        gradients = jax.jit(jax.grad(functools.partial(total, prototypes=prototypes), (0, 1)))(*maps(shots=K))
        assert (jnp.abs(gradients[0]).max() > 0) == flows
        assert jnp.abs(gradients[1]).max() > 0


def test_fitting_is_dampened_sgd():
    """With one batch an epoch the order does not matter, and torch's update can be written down."""
    support = normal(N, K, 4, 8)

    def scores(images, prototypes):
        return -jnp.square(images[..., :, None, :, :] - prototypes[..., None, :, :, :]).mean((-2, -1))

    def loss(prototypes):
        logits = scores(support.reshape(N * K, 4, 8), prototypes)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.repeat(jnp.arange(N), K)).mean()

    gradient = jax.jit(jax.grad(loss))
    expected, trace = support.mean(1), None
    for _ in range(4):
        g = gradient(expected)
        trace = g if trace is None else 0.9 * trace + (1 - 0.9) * g
        expected -= 0.1 * trace
    # Eight places for six images: the last two of the batch must count for nothing.
    fit = jax.jit(lambda x: fit_prototypes(x, jax.random.key(0), scores, epochs=4, batch_size=8))
    np.testing.assert_allclose(fit(support), expected, atol=1e-6)


def test_one_shot_has_nothing_to_fit():
    support, query = maps()
    sfc, mean = (run("classify", prototypes=name)(support, query) for name in ("sfc", "mean"))
    np.testing.assert_array_equal(sfc["logits"], mean["logits"])


def test_every_parameter_gets_a_gradient_and_patchformer_can_be_frozen():
    no_dropout = dict(support_dropout=0.0, query_dropout=0.0, patch_dropout=0.0)
    model = build(CONFIG | no_dropout | dict(encoder=ENCODER | dict(dropout_rate=0.0)))
    inputs, labels = images(1), jnp.arange(Q)[None] % N

    def loss(params):
        out = model.apply({"params": params}, *inputs, train=True)
        return sum(
            optax.softmax_cross_entropy_with_integer_labels(out[name], labels).mean()
            for name in ("logits", "global_scores")
        )

    gradient = jax.jit(jax.grad(loss))(variables_of()["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("key/bias"):  # adds the same to all scores of a query, which softmax takes away again
            assert jnp.abs(leaf).max() > 1e-7, name

    config = dict(name="sgd", learning_rate=0.1, schedule=dict(name="constant"), weight_decay=0.1, decay="all")
    for frozen in (False, True):
        model = build(CONFIG | dict(freeze_patchformer=frozen))
        optimizer, _ = make_optimizer(config, 1, model.frozen_parameters)
        params = variables_of()["params"]
        updates, _ = jax.jit(lambda g, p, opt=optimizer: opt.update(g, opt.init(p), p, step=0))(gradient, params)
        still = {name for name, update in updates.items() if all((x == 0).all() for x in jax.tree.leaves(update))}
        assert still == ({"patchformer"} if frozen else set())


def test_dropout_is_drawn_in_training_alone():
    model, inputs = build(CONFIG), maps()

    @jax.jit
    def train(key):
        rngs = {"dropout": key}
        return model.apply(variables_of(), *inputs, train=True, rngs=rngs, method="classify")

    first, second = train(jax.random.key(0)), train(jax.random.key(1))
    for name in ("global_scores", "local_logits"):
        assert jnp.abs(first[name] - second[name]).max() > 1e-3
    out = run("classify")(*inputs)  # needs no rng
    assert jnp.isfinite(out["logits"]).all()


def test_bfloat16_computes_scores_in_float32():
    inputs = images()
    full, half = (build(CONFIG, dtype=dtype) for dtype in ("float32", "bfloat16"))
    variables = jax.eval_shape(half.init, jax.random.key(0), *inputs)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
    assert half.encoder.backbone.dtype == "bfloat16"
    expected, got = (jax.jit(model.apply)(variables_of(), *inputs) for model in (full, half))
    assert got["patch_query"].dtype == jnp.bfloat16
    for name in ("logits", "global_scores", "local_logits"):
        assert got[name].dtype == jnp.float32
        np.testing.assert_allclose(got[name], expected[name], atol=0.3)


def test_every_parameter_names_its_axes():
    names = {"embed", "embed_out", "heads", "kv", "mlp", "norm"}
    names |= {f"conv_{part}" for part in ("height", "width", "in", "out")}
    boxed = jax.eval_shape(build(CONFIG).init, jax.random.key(0), *images())
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)):
        assert isinstance(leaf, meta.AxisMetadata), leaf
        assert len(leaf.names) == len(leaf.value.shape) and set(leaf.names) <= names


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(query_self_attn="causal"), "query_self_attn 'causal' is none of joint, diagonal"),
        (dict(projection_norm="batch"), "projection_norm 'batch' is none of layer, l2"),
        (dict(prototypes="median"), "prototypes 'median' is none of mean, sfc"),
        (dict(solver="opencv"), "solver 'opencv' is none of sinkhorn, exact"),
        (dict(encoder=ENCODER | dict(attn_axis="head")), "attn_axis 'head' is none of tokens, batch"),
    ],
)
def test_unknown_choices_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(build(CONFIG | changes).init, jax.random.key(0), *images())


def test_build_checks_names_and_keywords_at_every_depth():
    with pytest.raises(UsageError, match="model 'qsformr'.*qsformer"):
        build(CONFIG | dict(name="qsformr"))
    with pytest.raises(UsageError, match="model.encoder.backbone has no key 'width'.*widths"):
        build(CONFIG | dict(encoder=ENCODER | dict(backbone=dict(name="conv4", width=4))))


TOTALS = {"miniimagenet": 46_484_480, "tieredimagenet": 46_484_480, "fc100": 52_805_888, "cub": 40_163_072}


@pytest.mark.parametrize("name", TOTALS)
def test_published_parameter_counts(name):
    keywords = dict(VARIANTS[name])
    model = QSFormer(encoder=CIFE(backbone=ResNet12(), **keywords.pop("encoder")), **keywords)
    episode = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 1, 84, 84, 3), (1, 84, 84, 3)))
    params = jax.eval_shape(model.init, jax.random.key(0), *episode)["params"]
    size = {key: sum(x.size for x in jax.tree.leaves(value)) for key, value in params.items()}
    assert size["encoder"] == 25_879_296
    assert size["patchformer"] == 1_640_960
    unused = released_parameters(model)
    norms = 2 if name == "fc100" else 1
    assert set(unused.values()) == {640} and len(unused) == 2 * norms * model.num_blocks
    assert size["block_0"] == 6_321_408 - norms * 1280
    assert sum(size.values()) + sum(unused.values()) == TOTALS[name]


@pytest.mark.parametrize("name", TOTALS)
def test_configs_hold_the_published_settings(name):
    config = load_config(f"qsformer/{name}").to_dict()
    encoder = config["model"].pop("encoder")
    keywords = dict(VARIANTS[name])
    expected = dict(name="cife", backbone=dict(name="resnet12"), attn_axis="tokens")
    assert encoder == expected | keywords.pop("encoder")
    assert {key: config["model"][key] for key in keywords} == keywords
    assert config["task"]["mean"] == PREPROCESSING["mean"] and config["task"]["std"] == PREPROCESSING["std"]
    released = load_config(f"qsformer/{name}:released")
    assert released.model.encoder.attn_axis == "batch" and released.model.freeze_patchformer
