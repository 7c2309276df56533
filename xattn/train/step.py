"""One update: gradients over microbatches, a guard against non-finite ones, the moving average."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from xattn.parallel.mesh import value_and_grad
from xattn.train.optim import Schedule
from xattn.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    model: nn.Module,
    task: Any,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
    max_skipped: int | None = None,
    axis_name: str | None = None,
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, Metrics]]:
    """The pure function `step(state, batch, key)` that `train/loop.py` compiles.

    `key` is the run's: random numbers of step s and microbatch a come from `fold_in(fold_in(key, s), a)`. It is an
    argument, so that runs which differ in their seed alone share one compiled program. A step whose
    loss or gradient norm is not finite changes nothing but the counters.

    Args:
      model, task, optimizer, schedule: see `xattn.models`, `xattn.tasks` and `xattn.train.optim`; any optax
        optimizer will do.
      accumulate_steps: microbatches a step; gradients and metrics are their means, so a step equals one
        on the whole batch for losses that are means over examples of equal weight.
      ema_decay: of the parameters' moving average; 0 keeps none.
      max_skipped: after more steps than these in a row that are not finite none changes anything, so that a run whose
        counters are looked at only now and then stops where it went wrong. None goes on.
      axis_name: mapped axis (pmap, shard_map) whose replicas each have their rows of the batch. Gradients, metrics and
        running statistics are averaged over it, so a step is that without it on the whole batch, for the same
        losses as above; but each replica draws its own random numbers, and BatchNorm needs the name too.
    """

    def loss_fn(params: Any, model_state: Any, batch: dict, rng: jax.Array) -> tuple[jax.Array, tuple]:
        loss, metrics, new_state = task(
            model,
            {"params": params, **model_state},
            batch,
            train=True,
            rngs={"dropout": rng, "sfc": jax.random.fold_in(rng, 1)},
        )
        return loss, (metrics, new_state or model_state)

    update_fn = optax.with_extra_args_support(optimizer).update

    def gradients(state: TrainState, batch: dict, rng: jax.Array) -> tuple[Any, Metrics, Any]:
        grad_fn = value_and_grad(loss_fn)
        if accumulate_steps == 1:
            (_, (metrics, model_state)), grads = grad_fn(
                state.params, state.model_state, batch, jax.random.fold_in(rng, 0)
            )
            return grads, metrics, model_state
        # Microbatch a takes rows a, a + A, ...: with the rows sharded, each keeps its share of every one.
        micro = jax.tree.map(lambda x: x.reshape(-1, accumulate_steps, *x.shape[1:]).swapaxes(0, 1), batch)

        def accumulate(carry: tuple, inputs: tuple) -> tuple[tuple, Metrics]:
            total, model_state = carry
            index, rows = inputs
            (_, (metrics, model_state)), grads = grad_fn(
                state.params, model_state, rows, jax.random.fold_in(rng, index)
            )
            return (jax.tree.map(jnp.add, total, grads), model_state), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (total, model_state), metrics = jax.lax.scan(
            accumulate, (zeros, state.model_state), (jnp.arange(accumulate_steps), micro)
        )
        grads = jax.tree.map(lambda g: g / accumulate_steps, total)
        return grads, jax.tree.map(lambda m: m.mean(0), metrics), model_state

    def train_step(state: TrainState, batch: dict[str, jax.Array], key: jax.Array) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(key, state.step)
        if axis_name:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        grads, metrics, model_state = gradients(state, batch, rng)
        if axis_name:
            grads, metrics, model_state = jax.lax.pmean((grads, metrics, model_state), axis_name)
        norm = optax.tree.norm(grads)
        updates, opt_state = update_fn(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(
            lambda old, new: ema_decay * old + (1 - ema_decay) * new, state.ema, params if ema_decay else {}
        )
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        if max_skipped is not None:
            finite &= state.skipped_in_a_row <= max_skipped
        updated = replace(state, params=params, model_state=model_state, opt_state=opt_state, ema=ema)
        new = jax.tree.map(lambda good, old: jnp.where(finite, good, old), updated, state)
        new = replace(
            new,
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics |= {
            "learning_rate": jnp.asarray(schedule(state.step)),
            "grad_norm": norm,
            "param_norm": optax.tree.norm(new.params),
            "update_norm": optax.tree.norm(updates),
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
        }
        return new, metrics

    return train_step
