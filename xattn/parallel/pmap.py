"""The step under `jax.pmap`: a second, data-parallel mode, for code and habits that pmap has formed.

The same step function runs once a device on its rows of the batch, and averages gradients over the axis `AXIS`. The
state goes in and comes out whole, without an axis for the devices, so it is saved, restored and evaluated like that of
the other mode, and a run may change from one to the other.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.core import ShapedArray
from jax.sharding import Mesh

from xattn.config import UsageError
from xattn.parallel.mesh import shard_batch

AXIS = "data"


def check_mesh(mesh: Mesh) -> None:
    """Raises `UsageError` unless the mesh has replicas only."""
    if mesh.size != mesh.shape["data"]:
        raise UsageError(
            f"config.mode is 'pmap', which splits batches alone, but config.mesh is {dict(mesh.shape)}: give sizes of "
            "1 to all axes but data, or take the mode 'jit'."
        )


def lower(step: Callable, state: Any, batch: Mapping[str, Any], key: jax.Array, mesh: Mesh) -> Any:
    """The program of `step(state, batch, key)`, made for the axis `AXIS`, on every device of the mesh.

    Compiled, it takes a whole state (and gives it away) and a batch that is placed by `shard_by_device`.

    Args:
      step: from `make_train_step`.
      state, batch: their shapes, those of the whole batch.
      key: the run's.
      mesh: of replicas only.
    """
    mapped = jax.pmap(
        step, AXIS, in_axes=(None, 0, None), out_axes=None, devices=list(mesh.devices.flat), donate_argnums=0
    )
    # Called, or lowered for anything but `ShapedArray`, pmap takes and gives what one process has; for these, as jit
    # does, arrays over the devices of all processes.
    state = jax.tree.map(lambda leaf: ShapedArray(leaf.shape, leaf.dtype), state)
    rows = {
        name: ShapedArray((mesh.size, leaf.shape[0] // mesh.size, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in batch.items()
    }
    # A device that works alone has no mesh to split its arrays over.
    with jax.set_mesh(Mesh(np.empty((), object), ())), nn.logical_axis_rules(()):
        return mapped.lower(state, rows, key)


def shard_by_device(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows [B, ...] of a batch on the mesh by device: [devices, B / devices, ...]."""
    devices = len(mesh.local_devices)
    return shard_batch({name: rows.reshape(devices, -1, *rows.shape[1:]) for name, rows in batch.items()}, mesh)
