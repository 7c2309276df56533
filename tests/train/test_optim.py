"""Schedules in closed form, and updates against a few lines of numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from xattn.config import UsageError
from xattn.parallel.mesh import without_names
from xattn.train.optim import OPTIMIZERS, SCHEDULES, decay_mask, make_optimizer


def config(name="sgd", learning_rate=0.1, schedule=None, **options):
    return dict(name=name, learning_rate=learning_rate, schedule=schedule or dict(name="constant"), **options)


def tree(seed=0, scale=1.0):
    """Parameters of an attention layer, a norm and an embedding, by Flax's names."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "attention": {"query": {"kernel": draw(4, 2, 3), "bias": draw(2, 3)}},
        "norm": {"scale": draw(4), "bias": draw(4)},
        "table": {"embedding": draw(5, 4)},
    }


def run(optimizer, params, gradients):
    """The parameters after each of the updates."""
    state, path = optimizer.init(params), []
    for step, grads in enumerate(gradients):
        updates, state = optimizer.update(grads, state, params, step=jnp.asarray(step))
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def close(a, b, rtol=1e-5, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


# Schedules.


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (dict(name="constant"), {0: 0.2, 50: 0.2, 100: 0.2}),
        (dict(name="constant", warmup_steps=10), {0: 0.0, 5: 0.1, 10: 0.2, 100: 0.2}),
        (dict(name="cosine"), {0: 0.2, 25: 0.1 * (1 + np.cos(np.pi / 4)), 50: 0.1, 100: 0.0}),
        (
            dict(name="cosine", warmup_steps=20, final_fraction=0.1),
            # 0.02 + 0.18 (1 + cos) / 2 over the 80 steps after the warm-up
            {0: 0.0, 5: 0.05, 20: 0.2, 40: 0.02 + 0.09 * (1 + np.cos(np.pi / 4)), 60: 0.11, 100: 0.02, 150: 0.02},
        ),
        (dict(name="constant_cosine"), {0: 0.2, 50: 0.2, 75: 0.1, 100: 0.0, 150: 0.0}),
        (
            dict(name="constant_cosine", decay_start=0.2, warmup_steps=10, final_fraction=0.1),
            # 0.02 + 0.18 (1 + cos) / 2 over the last 80 steps
            {0: 0.0, 5: 0.1, 10: 0.2, 20: 0.2, 40: 0.02 + 0.09 * (1 + np.cos(np.pi / 4)), 60: 0.11, 100: 0.02},
        ),
        (dict(name="linear"), {0: 0.2, 25: 0.15, 100: 0.0, 150: 0.0}),
        (dict(name="linear", warmup_steps=20, final_fraction=0.5), {0: 0.0, 10: 0.1, 20: 0.2, 60: 0.15, 100: 0.1}),
        (dict(name="step", every=30, factor=0.5), {0: 0.2, 29: 0.2, 30: 0.1, 59: 0.1, 60: 0.05, 100: 0.025}),
        (dict(name="step", every=30, factor=0.5, warmup_steps=10), {0: 0.0, 5: 0.1, 10: 0.2, 39: 0.2, 40: 0.1}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if "name" in value else "",
)
def test_schedules_have_their_closed_form(schedule, expected):
    _, rate = make_optimizer(config(learning_rate=0.2, schedule=schedule), num_steps=100)
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(rate(jnp.asarray(step, jnp.int32)), value, rtol=1e-5, atol=1e-8)


def test_a_warm_up_longer_than_the_run_never_divides_by_zero():
    for name in ("cosine", "linear"):
        _, rate = make_optimizer(config(schedule=dict(name=name, warmup_steps=20)), num_steps=10)
        np.testing.assert_allclose(rate(10), 0.05, rtol=1e-6)


def test_the_step_of_the_caller_sets_the_learning_rate():
    """Not a count of the updates: some of them are left out, and a run continues in the middle."""
    optimizer, rate = make_optimizer(config(momentum=0.0, schedule=dict(name="linear")), num_steps=10)
    params, grads = {"kernel": jnp.ones(2)}, {"kernel": jnp.ones(2)}
    state = optimizer.init(params)
    for step in (7, 3, 3):
        updates, state = optimizer.update(grads, state, params, step=jnp.asarray(step))
        np.testing.assert_allclose(updates["kernel"], -0.1 * (1 - step / 10) * np.ones(2), rtol=1e-6)


# Optimizers.


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs(nesterov):
    """torch.optim.SGD: g += wd p;  m = mu m + g (m = g at first);  p -= lr (g + mu m, or m)."""
    mu, decay = 0.9, 0.05
    schedule = dict(name="step", every=2, factor=0.1)
    options = config(momentum=mu, nesterov=nesterov, weight_decay=decay, decay="all", schedule=schedule)
    optimizer, _ = make_optimizer(options, num_steps=3)
    params, gradients = {"kernel": tree()["table"]["embedding"]}, [{"kernel": jnp.full((5, 4), g)} for g in (1, -2, 3)]
    p, m = np.asarray(params["kernel"], np.float64), None
    for step, (grads, found) in enumerate(zip(gradients, run(optimizer, params, gradients), strict=True)):
        g = np.asarray(grads["kernel"], np.float64) + decay * p
        m = g if m is None else mu * m + g
        p = p - 0.1 * 0.1 ** (step // 2) * (g + mu * m if nesterov else m)
        np.testing.assert_allclose(found["kernel"], p, rtol=1e-5, atol=1e-6)


def adam_direction(gradients, b1=0.9, b2=0.999, eps=1e-8):
    """Adam's update in units of the learning rate, after all of `gradients` (arXiv 1412.6980, algorithm 1)."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return direction


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb"])
def test_adam_and_its_kin_against_their_papers(name):
    eps = dict(adam=1e-8, adamw=1e-8, lamb=1e-6)[name]
    decay = 0.0 if name == "adam" else 0.3
    options = config(name, **({} if name == "adam" else dict(weight_decay=decay)))
    optimizer, _ = make_optimizer(options, num_steps=2)
    gradients = [tree(1), tree(2)]
    path = [tree(), *run(optimizer, tree(), gradients)]
    decayed = decay_mask("kernels")(tree())
    for t in (1, 2):

        def expected(p, g1, g2, is_kernel, t=t):
            p = np.asarray(p, np.float64)
            direction = adam_direction([np.asarray(g, np.float64) for g in (g1, g2)[:t]], eps=eps)
            direction = direction + decay * is_kernel * p
            # LAMB, algorithm 2: the norm of the parameters over that of the direction, for each array
            ratio = np.linalg.norm(p) / np.linalg.norm(direction) if name == "lamb" else 1.0
            return p - 0.1 * ratio * direction

        close(path[t], jax.tree.map(expected, path[t - 1], *gradients, decayed), rtol=1e-4, atol=1e-6)


def test_lamb_trusts_parameters_at_zero():
    optimizer, _ = make_optimizer(config("lamb"), num_steps=1)
    (after,) = run(optimizer, {"bias": jnp.zeros(3)}, [{"bias": jnp.asarray([1.0, -2.0, 3.0])}])
    np.testing.assert_allclose(after["bias"], [-0.1, 0.1, -0.1], rtol=1e-4)


# Weight decay.


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_decay_shrinks_kernels_and_embeddings_only(name):
    optimizer, _ = make_optimizer(config(name, weight_decay=0.5), num_steps=1)
    (after,) = run(optimizer, tree(), [jax.tree.map(jnp.zeros_like, tree())])
    before, after = flatten_dict(tree(), sep="/"), flatten_dict(after, sep="/")
    for path in ("attention/query/bias", "norm/scale", "norm/bias"):
        np.testing.assert_array_equal(after.pop(path), before[path])
    assert set(after) == {"attention/query/kernel", "table/embedding"}
    for path, value in after.items():
        np.testing.assert_allclose(value, 0.95 * before[path], rtol=1e-6)


def test_decay_of_weights_reaches_latents_and_positions():
    """But no bias, and no scale of a norm: the released recipe of Perceiver IO."""
    optimizer, _ = make_optimizer(config("adamw", weight_decay=0.5, decay="weights"), num_steps=1)
    params = tree() | {"encoder": {"latents": jnp.ones((2, 3))}, "pos_embs": jnp.ones((4, 3))}
    (after,) = run(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])
    before, after = flatten_dict(params, sep="/"), flatten_dict(after, sep="/")
    for path in ("attention/query/bias", "norm/scale", "norm/bias"):
        np.testing.assert_array_equal(after.pop(path), before[path])
    assert set(after) == {"attention/query/kernel", "table/embedding", "encoder/latents", "pos_embs"}
    for path, value in after.items():
        np.testing.assert_allclose(value, 0.95 * before[path], rtol=1e-6)


def test_decay_all_shrinks_everything():
    optimizer, _ = make_optimizer(config("adamw", weight_decay=0.5, decay="all"), num_steps=1)
    (after,) = run(optimizer, tree(), [jax.tree.map(jnp.zeros_like, tree())])
    close(after, jax.tree.map(lambda p: 0.95 * p, tree()))


def test_masks_see_through_boxes_with_logical_names():
    """`abstract_state` initialises the optimizer with boxed parameters, the step updates plain ones."""
    boxed = jax.tree.map(lambda p: nn.LogicallyPartitioned(p, (None,) * p.ndim), tree())
    options = config("adamw", weight_decay=0.5, clip_norm=1.0)
    optimizer, _ = make_optimizer(options, num_steps=1, frozen=("norm",))
    state = without_names(optimizer.init(boxed))
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(tree()))
    mask = decay_mask("kernels")(boxed)
    assert jax.tree.leaves(mask) == jax.tree.leaves(decay_mask("kernels")(tree())) == [False, True, False, False, True]


# Frozen parameters and clipping.


def test_frozen_parameters_stay_bit_equal_under_decay_and_leave_the_clip_norm():
    options = config("adamw", weight_decay=0.5, decay="all", clip_norm=1.0)
    frozen, _ = make_optimizer(options, num_steps=1, frozen=("attention", "norm/scale"))
    params, grads = tree(), tree(1, scale=100.0)
    (after,) = run(frozen, params, [grads])
    jax.tree.map(np.testing.assert_array_equal, after["attention"], params["attention"])
    np.testing.assert_array_equal(after["norm"]["scale"], params["norm"]["scale"])
    assert not np.array_equal(after["norm"]["bias"], params["norm"]["bias"])

    # With SGD the update shows the norm that was clipped by: that of the two arrays which train.
    sgd, _ = make_optimizer(config(momentum=0.0, clip_norm=1.0), num_steps=1, frozen=("attention", "norm/scale"))
    (after,) = run(sgd, params, [grads])
    moved = jax.tree.map(lambda a, b: a - b, after, params)
    trained = {"bias": grads["norm"]["bias"], "embedding": grads["table"]["embedding"]}
    norm = np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in trained.values()))
    np.testing.assert_allclose(moved["norm"]["bias"], -0.1 * trained["bias"] / norm, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(moved["table"]["embedding"], -0.1 * trained["embedding"] / norm, rtol=1e-3, atol=1e-6)


def test_a_frozen_prefix_ends_at_a_name():
    optimizer, _ = make_optimizer(config(momentum=0.0), num_steps=1, frozen=("block_1",))
    params = {"block_1": {"kernel": jnp.ones(2)}, "block_10": {"kernel": jnp.ones(2)}}
    (after,) = run(optimizer, params, [params])
    np.testing.assert_array_equal(after["block_1"]["kernel"], 1.0)
    np.testing.assert_allclose(after["block_10"]["kernel"], 0.9)


@pytest.mark.parametrize(("clip_norm", "factor"), [(0.5, 0.1), (10.0, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, factor):
    optimizer, _ = make_optimizer(config(momentum=0.0, clip_norm=clip_norm), num_steps=1)
    params, grads = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}
    (after,) = run(optimizer, params, [grads])
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-0.3 * factor, -0.4 * factor], rtol=1e-6)


# What is refused.


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (config("admw"), "there is no optimizer 'admw': did you mean 'adamw'"),
        (config(schedule=dict(name="cosin")), "there is no schedule 'cosin': did you mean 'cosine'"),
        (config("adam", weight_decay=0.1), "config.optimizer has no key 'weight_decay'"),
        (config("adam", clipnorm=1.0), "config.optimizer has no key 'clipnorm': did you mean 'clip_norm'"),
        (config("adam", mask=1), "config.optimizer has no key 'mask'"),
        (config("sgd", momentun=0.5), "config.optimizer has no key 'momentun': did you mean 'momentum'"),
        (
            config(schedule=dict(name="step", evry=3)),
            "config.optimizer.schedule has no key 'evry': did you mean 'every'",
        ),
        (config(schedule=dict(name="cosine", num_steps=3)), "config.optimizer.schedule has no key 'num_steps'"),
        (config("adamw", decay="kernel"), "config.optimizer.decay is 'kernel': choose 'all', 'weights', 'kernels'"),
    ],
)
def test_unknown_names_and_keys_are_one_sentence(options, sentence):
    with pytest.raises(UsageError) as error:
        make_optimizer(options, num_steps=10)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_optimizer_runs_with_every_schedule_under_jit(name, schedule):
    optimizer, _ = make_optimizer(config(name, schedule=dict(name=schedule)), num_steps=4)
    params = {"kernel": jnp.asarray([3.0, -2.0])}
    value = lambda p: jnp.square(p["kernel"]).sum()  # noqa: E731

    @jax.jit
    def update(params, state, step):
        updates, state = optimizer.update(jax.grad(value)(params), state, params, step=step)
        return optax.apply_updates(params, updates), state

    after, _ = update(params, optimizer.init(params), jnp.int32(0))
    assert value(after) < value(params)
