"""Model, state and step of a config, planned for a mesh: traced, and nothing of it allocated."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from xattn import data, models, tasks
from xattn.config import Config, UsageError, lookup
from xattn.parallel import pmap
from xattn.parallel.mesh import batch_shapes, check_batch, use_mesh
from xattn.train.optim import make_optimizer
from xattn.train.state import TrainState, abstract_state
from xattn.train.step import make_train_step


@dataclass(frozen=True)
class Plan:
    """What `train/loop.py` runs, and `analysis/step_cost.py` looks at.

    Attributes:
      model: the module.
      create: makes the first state from a random key, sharded from the start.
      state: the state's shapes with their shardings.
      batch: the shapes of a whole batch with theirs.
      notes: a line for each parameter that the mesh should split but leaves whole.
      train_step: the function of a step.
      lowered: the same, traced for the mesh; `.compile()` takes it on.
    """

    model: nn.Module
    create: Callable[[jax.Array], TrainState]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    notes: list[str]
    train_step: Callable[..., Any]
    lowered: Any


def make_plan(config: Config, mesh: Mesh) -> Plan:
    """Plans the run of `config` on `mesh`, whatever mesh the config names.

    Raises:
      UsageError: something in the config does not fit the mesh or the rest of the config.
    """
    mapped = config.mode == "pmap"
    model = models.build(config.model.to_dict(), dtype=config.dtype)
    task = tasks.build(config.task.to_dict())
    frozen = getattr(model, "frozen_parameters", ())
    optimizer, schedule = make_optimizer(config.optimizer.to_dict(), config.num_steps, frozen)
    train_step = make_train_step(
        model,
        task,
        optimizer,
        schedule,
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema_decay,
        max_skipped=config.max_skipped,
        axis_name=pmap.AXIS if mapped else None,
    )
    with use_mesh(mesh), misfits_named():
        batch = batch_shapes(data.batch_shapes(config.data.to_dict(), config.pipeline.to_dict()), mesh)
        create, state, notes = abstract_state(model, task, optimizer, batch, config.ema_decay > 0, mesh)
        key = jax.random.key(config.seed)
        if mapped:
            lowered = pmap.lower(train_step, state, batch, key, mesh)
        else:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
            lowered = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, batch, key)
    return Plan(model, create, state, batch, notes, train_step, lowered)


def check_layout(config: Config, mesh: Mesh) -> None:
    """Raises `UsageError` for an unknown mode, or a mesh, a batch or a model that does not fit it."""
    lookup({"jit": None, "pmap": None}, config.mode, "mode")
    if config.mode == "pmap":
        pmap.check_mesh(mesh)
    else:
        named = [
            f"config.model.{path}"
            for path, value in flatten_dict(config.model.to_dict(), sep=".").items()
            if path.split(".")[-1] == "axis_name" and value
        ]
        if named:
            raise UsageError(
                f"{named[0]} is for the mode 'pmap': in the mode 'jit' BatchNorm averages over the whole batch without "
                "it."
            )
    check_batch(config.pipeline.batch_size, config.accumulate_steps, mesh)


@contextmanager
def misfits_named() -> Iterator[None]:
    """What ops and libraries say of arguments and shapes that don't fit, in one sentence."""
    try:
        yield
    except UsageError:
        raise
    except KeyError as error:
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent.name != "tasks":
            raise
        raise UsageError(f"task and data of the config do not fit: the batches have no {error}.") from error
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError) and "shape" not in str(error):  # a mistake in the program, not in the config
            raise
        raise UsageError(f"model, task and data of the config do not fit: {str(error).splitlines()[0]}") from error
