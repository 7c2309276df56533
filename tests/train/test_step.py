"""The step on a model small enough to check by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from xattn.parallel.mesh import make_mesh
from xattn.train.optim import make_optimizer
from xattn.train.state import TrainState, abstract_state
from xattn.train.step import make_train_step


class Regressor(nn.Module):
    """A hidden layer, with dropout and a running mean of what goes into it."""

    dropout_rate: float = 0.0
    running: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        if self.running:
            mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1])
            if train:
                mean.value = 0.5 * mean.value + 0.5 * x.mean(0)
        x = nn.tanh(nn.Dense(4)(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(1)(x)[..., 0]


class Squares:
    """Mean squared error; tells the mean prediction too."""

    def inputs(self, batch):
        return (batch["x"],)

    def __call__(self, model, variables, batch, *, train, rngs):
        output, changed = model.apply(variables, batch["x"], train=train, rngs=rngs, mutable=["batch_stats"])
        loss = jnp.square(output - batch["y"]).mean()
        return loss, {"loss": loss, "prediction": output.mean()}, changed


OPTIMIZER = dict(name="adam", learning_rate=0.1, schedule=dict(name="linear"))


def batch(seed: int, rows: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(rows, 3)).astype(np.float32), "y": rng.normal(size=rows).astype(np.float32)}


KEY = jax.random.key(7)


@functools.cache
def setup(
    dropout_rate: float = 0.0,
    running: bool = False,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    plain: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """`(create, step, optimizer, schedule)`, the step compiled."""
    model, task = Regressor(dropout_rate, running), Squares()
    optimizer, schedule = make_optimizer(OPTIMIZER, num_steps=20)
    if plain:
        optimizer, schedule = optax.sgd(0.1), optax.constant_schedule(0.1)
    create, _, _ = abstract_state(model, task, optimizer, batch(0), ema_decay > 0, make_mesh(1))
    step = jax.jit(make_train_step(model, task, optimizer, schedule, accumulate_steps, ema_decay))
    return functools.partial(create, KEY), functools.partial(step, key=KEY), optimizer, schedule


def loss_at(params, data):
    return Squares()(Regressor(), {"params": params}, data, train=True, rngs={})[0]


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def test_two_steps_equal_the_optimizer_on_the_gradient():
    create, step, optimizer, schedule = setup()
    state = create()
    params, opt_state = state.params, state.opt_state
    for number in range(2):
        data = batch(number)
        loss, grads = jax.value_and_grad(loss_at)(params, data)
        updates, opt_state = optimizer.update(grads, opt_state, params, step=jnp.asarray(number))
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, data)
        close(state.params, params)
        close(state.opt_state, opt_state)
        assert (int(state.step), int(state.skipped)) == (number + 1, 0)
        expected = {
            "loss": loss,
            "learning_rate": schedule(number),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "update_norm": optax.tree.norm(updates),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
        assert {"prediction", "skipped", "skipped_in_a_row"} <= set(metrics)
    assert state.ema == {}


@pytest.mark.parametrize("accumulate_steps", [2, 3])
def test_microbatches_add_up_to_the_whole_batch(accumulate_steps):
    create, whole, *_ = setup()
    _, parts, *_ = setup(accumulate_steps=accumulate_steps)
    one, other = create(), create()
    for number in range(2):
        one, metrics = whole(one, batch(number))
        other, accumulated = parts(other, batch(number))
        close(other.params, one.params, rtol=1e-4, atol=1e-5)
        close(accumulated, metrics, rtol=1e-4, atol=1e-5)


def test_microbatch_a_takes_rows_a_and_every_a_th_after():
    """Contiguous blocks would move rows between devices, since each device holds a block."""
    create, step, *_ = setup(running=True, accumulate_steps=3)
    data = batch(1)
    state, _ = step(create(), data)
    mean = np.zeros(3)
    for index in range(3):
        mean = 0.5 * mean + 0.5 * data["x"][index::3].mean(0)
    np.testing.assert_allclose(state.model_state["batch_stats"]["mean"], mean, rtol=1e-5)


def test_each_microbatch_has_its_own_dropout():
    create, step, *_ = setup(dropout_rate=0.5, accumulate_steps=2)
    twice = {name: np.repeat(rows[:6], 2, axis=0) for name, rows in batch(0).items()}  # equal microbatches
    _, metrics = step(create(), twice)
    once = {name: rows[:6] for name, rows in batch(0).items()}
    _, single = setup(dropout_rate=0.5)[1](create(), once)
    assert not np.isclose(metrics["loss"], single["loss"], rtol=1e-4)


def test_dropout_is_a_function_of_the_step_alone():
    create, step, *_ = setup(dropout_rate=0.5)
    state, data = create(), batch(0)
    losses = {}
    for number in (3, 4, 3):
        _, metrics = step(state.replace(step=jnp.int32(number)), data)
        losses.setdefault(number, []).append(float(metrics["loss"]))
    assert losses[3][0] == losses[3][1]
    assert losses[3][0] != losses[4][0]
    still = setup()[1]
    assert still(state.replace(step=jnp.int32(3)), data)[1]["loss"] == still(state, data)[1]["loss"]


def test_another_seed_drops_other_weights_with_the_same_compiled_program():
    create, step, *_ = setup(dropout_rate=0.5)
    state, data = create(), batch(0)
    keys = [jax.random.key(seed) for seed in (1, 2)]
    losses = [float(step(state, data, key=key)[1]["loss"]) for key in keys]
    assert losses[0] != losses[1]
    programs = [step.func.lower(state, data, key=key).as_text() for key in keys]
    assert programs[0] == programs[1]


def test_ema_is_the_geometric_mean_of_the_parameters_so_far():
    decay = 0.75
    create, step, *_ = setup(ema_decay=decay)
    state = create()
    equal(state.ema, state.params)
    history = [state.params]
    for number in range(3):
        state, _ = step(state, batch(number))
        history.append(state.params)
    weights = [decay**3] + [(1 - decay) * decay ** (3 - k) for k in (1, 2, 3)]
    close(state.ema, jax.tree.map(lambda *p: sum(w * x for w, x in zip(weights, p, strict=True)), *history))


@pytest.mark.parametrize(("bad", "accumulate_steps"), [(np.nan, 1), (1e30, 1), (np.inf, 3)])
def test_a_batch_that_is_not_finite_changes_nothing_but_the_counters(bad, accumulate_steps):
    create, step, _, schedule = setup(running=True, ema_decay=0.9, accumulate_steps=accumulate_steps)
    state, _ = step(create(), batch(0))
    poisoned = batch(1)
    poisoned["y"][4] = bad  # 1e30: the loss overflows although every input is finite
    before = state
    for count in (1, 2):
        state, metrics = step(state, poisoned)
        for part in ("params", "opt_state", "model_state", "ema"):
            equal(getattr(state, part), getattr(before, part))
        assert int(state.step) == 1 + count
        assert (int(state.skipped), int(state.skipped_in_a_row)) == (count, count)
        assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (count, count)
        assert not np.isfinite(metrics["loss"])
        np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(before.params), rtol=1e-6)
        np.testing.assert_allclose(metrics["learning_rate"], schedule(count), rtol=1e-6)

    good, metrics = step(state, batch(2))
    assert (int(good.step), int(good.skipped), int(good.skipped_in_a_row)) == (4, 2, 0)
    assert np.isfinite(metrics["loss"])
    # The next good update is that of a run at the same step: the two left out don't hold the schedule back.
    untouched, _ = step(before.replace(step=jnp.int32(3)), batch(2))
    for part in ("params", "opt_state", "model_state", "ema"):
        equal(getattr(good, part), getattr(untouched, part))
        assert any(
            not np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(getattr(good, part)), jax.tree.leaves(getattr(before, part)), strict=True)
        )
    np.testing.assert_allclose(metrics["learning_rate"], schedule(3), rtol=1e-6)


def test_after_too_many_that_are_not_finite_no_update_is_made():
    """The counter is looked at only now and then: a good batch in between must not hide what came before."""
    optimizer, schedule = make_optimizer(OPTIMIZER, num_steps=20)
    step = jax.jit(make_train_step(Regressor(), Squares(), optimizer, schedule, max_skipped=1))
    poisoned = batch(1)
    poisoned["y"][4] = np.nan
    state, counts = setup()[0](), []
    for data in (batch(0), poisoned, batch(2), poisoned, poisoned, batch(3), batch(4)):
        before, (state, _) = state, step(state, data, KEY)
        counts.append((int(state.skipped), int(state.skipped_in_a_row)))
    assert counts == [(0, 0), (1, 1), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]
    for part in ("params", "opt_state"):
        equal(getattr(state, part), getattr(before, part))


class Kinked(Squares):
    """Has no gradient where `bend` is 0, and a loss that is not finite where `offset` is not."""

    def __call__(self, model, variables, batch, **kwargs):
        output = model.apply(variables, batch["x"])
        loss = jnp.linalg.norm(batch["bend"] * output) + batch["offset"].sum()
        return loss, {"loss": loss}, {}


def test_a_loss_or_a_gradient_alone_that_is_not_finite_is_enough():
    model, task, optimizer = Regressor(), Kinked(), optax.sgd(0.1)
    step = jax.jit(make_train_step(model, task, optimizer, optax.constant_schedule(0.1)))
    state = setup(plain=True)[0]()
    base = batch(0) | {"bend": np.float32(1), "offset": np.zeros(12, np.float32)}
    after, _ = step(state, base, KEY)
    assert int(after.skipped) == 0
    for name, value, finite in (("bend", np.float32(0), "loss"), ("offset", np.full(12, np.nan), "grad_norm")):
        after, metrics = step(state, base | {name: np.float32(value)}, KEY)
        assert int(after.skipped) == 1
        assert [key for key in ("loss", "grad_norm") if np.isfinite(metrics[key])] == [finite]
        equal(after.params, state.params)


def test_the_step_keeps_the_types_of_the_state():
    """A state that changed its types would be compiled for twice, and could not be restored."""
    create, step, *_ = setup(running=True, ema_decay=0.9)
    state = create()
    described = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert isinstance(state, TrainState)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), step(state, batch(0))[0]) == described


def test_any_optax_optimizer_will_do():
    create, step, *_ = setup(plain=True)
    state = create()
    after, _ = step(state, batch(0))
    grads = jax.grad(loss_at)(state.params, batch(0))
    close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads))


def test_parts_of_a_state_cover_it_once():
    state = setup(running=True, ema_decay=0.9)[0]()
    parts = state.inference_part() | state.training_part()
    assert len(parts) == len(state.inference_part()) + len(state.training_part())
    equal(TrainState(**parts), state)
