"""What a training run remembers between two steps, created in place on its mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from xattn.parallel.mesh import state_shardings, without_names


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds, as arrays or their shapes; random numbers and data follow from `step`.

    Attributes:
      step: int32, updates done.
      params: parameters, float32.
      model_state: the model's other collections, such as `batch_stats`.
      opt_state: optax's state.
      ema: moving average of the parameters, or an empty dict.
      skipped, skipped_in_a_row: int32, updates that were left out because they were not finite.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any
    skipped: Any
    skipped_in_a_row: Any

    def inference_part(self) -> dict[str, Any]:
        """What `xattn.load` needs."""
        return {"params": self.params, "model_state": self.model_state, "ema": self.ema}

    def training_part(self) -> dict[str, Any]:
        """What only a continued run needs."""
        counters = {"step": self.step, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return {"opt_state": self.opt_state, **counters}


def abstract_state(
    model: nn.Module,
    task: Any,
    optimizer: optax.GradientTransformation,
    batch: Mapping[str, Any],
    ema: bool,
    mesh: Mesh,
) -> tuple[Any, Any, list[str]]:
    """Plans a state without allocating it; `batch` holds the shapes of one.

    Returns:
      `(create, abstract, notes)`: a compiled-on-call function that makes the state from a random key, sharded
      from the start; the state's shapes with shardings; lines about axes left whole.
    """

    def boxed(key: jax.Array) -> TrainState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
        params_key, dropout_key = jax.random.split(key)
        variables = dict(model.init({"params": params_key, "dropout": dropout_key}, *task.inputs(zeros)))
        params = variables.pop("params")
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=variables,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else {},
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_a_row=jnp.zeros((), jnp.int32),
        )

    shapes = jax.eval_shape(boxed, jax.random.key(0))
    shardings, notes = state_shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        without_names(shapes),
        shardings,
    )
    create = jax.jit(lambda key: without_names(boxed(key)), out_shardings=shardings)
    params_notes = [note for note in notes if note.startswith("params/")]
    return create, abstract, params_notes
