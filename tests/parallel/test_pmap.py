"""The step under pmap beside the step under jit, on eight simulated devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from xattn.config import UsageError
from xattn.parallel import pmap
from xattn.parallel.mesh import batch_shapes, make_mesh, shard_batch, use_mesh
from xattn.train.optim import make_optimizer
from xattn.train.state import abstract_state
from xattn.train.step import make_train_step

KEY = jax.random.key(7)


class Small(nn.Module):
    """A hidden layer behind a norm, with a constraint that names axes, as the models have."""

    batch_norm: bool = False
    dropout_rate: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.with_logical_constraint(x, ("batch", "act_embed"))
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5, axis_name=self.axis_name, name="norm")(x)
        else:
            x = nn.LayerNorm(name="norm")(x)
        x = nn.tanh(nn.Dense(4)(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(1)(x)[..., 0]


class Squares:
    """Mean squared error."""

    def inputs(self, batch):
        return (batch["x"],)

    def __call__(self, model, variables, batch, *, train, rngs):
        output, changed = model.apply(variables, batch["x"], train=train, rngs=rngs, mutable=["batch_stats"])
        loss = jnp.square(output - batch["y"]).mean()
        return loss, {"loss": loss}, changed


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(2, 3, (32, 3)).astype(np.float32), "y": rng.normal(size=32).astype(np.float32)}


def steps(mode: str, model: nn.Module, count: int, accumulate_steps: int = 1, **poison: float) -> tuple[Any, list, Any]:
    """`(first state, metrics, last state)` of some steps on eight devices."""
    mesh = make_mesh(data=8)
    optimizer, schedule = make_optimizer(dict(name="adam", learning_rate=0.1, schedule=dict(name="constant")), count)
    axis_name = pmap.AXIS if mode == "pmap" else None
    step = make_train_step(model, Squares(), optimizer, schedule, accumulate_steps, max_skipped=9, axis_name=axis_name)
    with use_mesh(mesh):
        shapes = batch_shapes({k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch(0).items()}, mesh)
        create, abstract, _ = abstract_state(model, Squares(), optimizer, shapes, False, mesh)
        if mode == "pmap":
            update, place = pmap.lower(step, abstract, shapes, KEY, mesh).compile(), pmap.shard_by_device
        else:
            update, place = jax.jit(step, donate_argnums=0), shard_batch
        state, rows = create(KEY), []
        first = jax.device_get(state)
        for number in range(count):
            data = batch(number)
            for name, value in poison.items():
                data[name][5] = value
            state, metrics = update(state, place(data, mesh), KEY)
            rows.append(jax.device_get(metrics))
    return first, rows, jax.device_get(state)


def close(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), a, b)


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_ten_steps_equal_those_under_jit(accumulate_steps):
    first, mapped, last = steps("pmap", Small(), 10, accumulate_steps)
    same, jitted, expected = steps("jit", Small(), 10, accumulate_steps)
    jax.tree.map(np.testing.assert_array_equal, first, same)
    for row, other in zip(mapped, jitted, strict=True):
        close(row, other)
    assert mapped[0]["loss"] != mapped[9]["loss"]
    close(last, expected)


def test_batch_norm_needs_the_axis_name_for_the_statistics_of_the_whole_batch():
    statistics = {
        case: steps(mode, Small(batch_norm=True, axis_name=axis_name), 1)[2].model_state["batch_stats"]["norm"]
        for case, mode, axis_name in (("jit", "jit", None), ("named", "pmap", pmap.AXIS), ("unnamed", "pmap", None))
    }
    x = batch(0)["x"]
    close(statistics["jit"], {"mean": 0.5 * x.mean(0), "var": 0.5 + 0.5 * x.var(0)})
    close(statistics["named"], statistics["jit"])
    # Without it, the spread between the devices' means is missing: variances are those of 4 rows, averaged.
    np.testing.assert_allclose(statistics["unnamed"]["mean"], statistics["jit"]["mean"], rtol=1e-5)
    within = x.reshape(8, 4, 3).var(1).mean(0)
    np.testing.assert_allclose(statistics["unnamed"]["var"], 0.5 + 0.5 * within, rtol=1e-4)
    assert (statistics["unnamed"]["var"] < statistics["jit"]["var"] - 0.1).all()


def test_each_replica_draws_its_own_dropout():
    model = Small(dropout_rate=0.5)
    first, (row,), _ = steps("pmap", model, 1)
    parts = {name: values.reshape(8, 4, *values.shape[1:]) for name, values in batch(0).items()}
    losses = []
    for replica in range(8):
        rng = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, 0), replica), 0)
        part = {name: values[replica] for name, values in parts.items()}
        losses.append(Squares()(model, {"params": first.params}, part, train=True, rngs={"dropout": rng})[0])
    np.testing.assert_allclose(row["loss"], np.mean(losses), rtol=1e-5)


def test_one_replica_that_is_not_finite_holds_all_back():
    first, rows, last = steps("pmap", Small(), 2, x=np.nan)
    assert [int(row["skipped"]) for row in rows] == [1, 2]
    jax.tree.map(np.testing.assert_array_equal, first.params, last.params)


def test_a_mesh_of_more_than_replicas_is_refused():
    pmap.check_mesh(make_mesh(data=4))
    with pytest.raises(UsageError, match="config.mode is 'pmap', .* 'tensor': 2, .* take the mode 'jit'"):
        pmap.check_mesh(make_mesh(data=4, tensor=2))
