"""The device mesh, and the one table that maps logical axis names to mesh axes.

Modules name what an axis of an array means ("embed", "heads", "batch"); only this file says over which
mesh axis it is split. The mesh has four axes: `data` (replicas), `fsdp` (replicas that also share the
parameters among them), `tensor` (heads and hidden units) and `sequence` (keys of one long context).
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from xattn.config import UsageError

AXES = ("data", "fsdp", "tensor", "sequence")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # parameters
    ("embed", "fsdp"),
    ("embed_out", None),
    ("heads", "tensor"),
    ("kv", None),
    ("mlp", "tensor"),
    ("vocab", None),
    ("positions", None),
    ("latents", None),
    ("conv_time", None),
    ("conv_height", None),
    ("conv_width", None),
    ("conv_in", None),
    ("conv_out", "fsdp"),
    ("norm", None),
    ("classes", None),
    # activations
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_kv", None),
    ("act_mlp", "tensor"),
)


BATCH = PartitionSpec(("data", "fsdp"))

LISTED = 2**16
"""How many values make a parameter large: such a one is not left whole without a word."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
    """A mesh over this run's devices with the axes `data, fsdp, tensor, sequence`.

    One size may be -1: it takes the devices that the others leave. A mesh smaller than the machine uses
    the first devices. Devices of one process are arranged by their places in its machine; of several processes, in the
    order of processes, so that each has rows of a batch that lie behind each other, whatever machine or slice it is in.

    Raises:
      UsageError: the sizes need more devices than there are, or don't divide them.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UsageError(f"config.mesh is {sizes}: give positive sizes, and -1 to at most one axis.")
    devices = in_order(jax.devices())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > len(devices) or (free and len(devices) % fixed):
        raise UsageError(
            f"config.mesh {sizes} does not fit {len(devices)} {devices[0].platform} device(s): "
            f"the product of the sizes must {'divide' if free else 'not exceed'} their number."
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes.values())
    return Mesh(arrange(devices[: math.prod(shape)], shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def in_order(devices: Sequence[Any]) -> list[Any]:
    """Devices in the order of their slices, and within one of their processes."""
    return sorted(devices, key=lambda x: (getattr(x, "slice_index", None) or 0, x.process_index, x.id))


def arrange(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices that are `in_order`, as an array of this shape: see `make_mesh`."""
    if len({device.process_index for device in devices}) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(shape)


def evaluation_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
    """The mesh on which a run of these sizes is evaluated.

    It is the run's own if that splits parameters and there are devices for it. Otherwise it has replicas only, on as
    many devices as the run's, or as there are if they are fewer; of several processes each takes part with all of its
    devices.
    """
    sizes, available = (data, fsdp, tensor, sequence), len(jax.devices())
    fixed = math.prod(size for size in sizes if size != -1)
    all_used = available % fixed == 0 if -1 in sizes else available == fixed
    fits = all_used or (jax.process_count() == 1 and -1 not in sizes and fixed < available)
    if (fsdp, tensor) != (1, 1) and fits:
        return make_mesh(*sizes)
    if jax.process_count() > 1:
        return make_mesh()
    return make_mesh(data=available if -1 in sizes else min(available, fixed))


def num_replicas(mesh: Mesh) -> int:
    """How many parts of a batch the mesh works on at once; 1 for the empty mesh."""
    return mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes `mesh` and the logical rules current: sharding constraints in modules refer to both."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def value_and_grad(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.value_and_grad(loss_fn, has_aux=True)`, with parameters gathered layer by layer in each of the two passes.

    On a mesh with `fsdp` a compiler would gather those of all microbatches at once, and keep them from the forward to
    the backward pass: all parameters, whole on each device. Barriers tell it to take their parts again.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return jax.value_and_grad(loss_fn, has_aux=True)

    def in_two_passes(params: Any, *rest: Any) -> tuple[Any, Any]:
        params, rest = jax.lax.optimization_barrier((params, rest))
        loss, pull, aux = jax.vjp(lambda params: loss_fn(params, *rest), params, has_aux=True)
        pull, one = jax.lax.optimization_barrier((pull, jnp.ones_like(loss)))
        return (loss, aux), pull(one)[0]

    return in_two_passes


def without_names(tree: Any) -> Any:
    """The tree with plain leaves instead of boxes that carry logical axis names.

    `flax.core.meta.unbox` would also constrain each leaf's sharding, which shapes don't have.
    """
    return jax.tree.map(lambda leaf: leaf.value if _named(leaf) else leaf, tree, is_leaf=_named)


def _named(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def state_shardings(abstract: Any, mesh: Mesh) -> tuple[Any, list[str]]:
    """Shardings for a tree of shapes whose leaves may carry logical axis names.

    Args:
      abstract: what `jax.eval_shape` gives for an initialisation; annotated leaves are
        `nn.LogicallyPartitioned`, others are replicated.
      mesh: from `make_mesh`.

    Returns:
      A tree of `NamedSharding` (without the boxes), and one line for each parameter axis that its mesh
      axis does not divide (it is replicated) and for each other array of `LISTED` values that a mesh with `fsdp` or
      `tensor` leaves whole on each device.

    Raises:
      UsageError: a logical name that has no rule.
    """
    rules = dict(RULES)
    notes = []
    parameters_split = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        shape, names = (leaf.value.shape, leaf.names) if _named(leaf) else (leaf.shape, ())
        spec = []
        for size, name in zip(shape, names, strict=_named(leaf)):
            if name is not None and name not in rules:
                raise UsageError(
                    f"{where} uses the logical axis '{name}', which has no rule: add one to RULES "
                    "in xattn/parallel/mesh.py."
                )
            axis = rules.get(name) if name is not None else None
            if isinstance(axis, str) and size % mesh.shape[axis]:
                notes.append(
                    f"{where}: '{name}' of size {size} stays whole, mesh axis '{axis}' has size {mesh.shape[axis]}"
                )
                axis = None
            spec.append(axis)
        result = NamedSharding(mesh, PartitionSpec(*spec))
        listed = bool(notes) and notes[-1].startswith(f"{where}: ")
        if parameters_split and result.is_fully_replicated and math.prod(shape) >= LISTED and not listed:
            notes.append(f"{where}: this mesh splits none of its axes {names}, {math.prod(shape):,} values stay whole")
        return result

    return jax.tree_util.tree_map_with_path(sharding, abstract, is_leaf=_named), notes


def check_batch(batch_size: int, accumulate_steps: int, mesh: Mesh) -> None:
    """Raises `UsageError` unless `batch_size` splits into microbatches that the mesh divides."""
    if batch_size < 1 or accumulate_steps < 1:
        raise UsageError(
            f"config.pipeline.batch_size is {batch_size} and config.accumulate_steps is {accumulate_steps}: "
            "both must be positive."
        )
    replicas = num_replicas(mesh)
    if batch_size % (accumulate_steps * replicas):
        raise UsageError(
            f"config.pipeline.batch_size is {batch_size}, which does not split into {accumulate_steps} "
            f"microbatch(es) over {replicas} replicas (mesh data x fsdp): make it a multiple of "
            f"{accumulate_steps * replicas}."
        )


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process puts on the mesh, of how many equal parts: `(index, count)`.

    Processes that only `tensor` or `sequence` tells apart hold the same rows, so they have the same index. Without a
    mesh each has all.

    Raises:
      UsageError: the mesh leaves a process without a device, or gives it other rows than such a part.
    """
    if mesh.empty:
        return 0, 1
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(num_replicas(mesh), -1)
    part = part_of(jax.process_index(), owners, jax.process_count())
    if part is None:
        raise UsageError(
            f"config.mesh {dict(mesh.shape)} does not fit {jax.process_count()} processes with "
            f"{jax.local_device_count()} devices each: use every device, and let `data` x `fsdp` split evenly over "
            "the processes, or `tensor` x `sequence` be a multiple of a process's devices."
        )
    return part


def part_of(process: int, owners: Int[np.ndarray, "replicas devices"], num_processes: int) -> tuple[int, int] | None:
    """`row_share` for one process, from the owner of each device; None where not every process has an equal part."""
    rows = [np.flatnonzero((owners == owner).any(1)).tolist() for owner in range(num_processes)]
    size = len(rows[0])
    parts = [list(range(begin, begin + size)) for begin in range(0, len(owners), size or 1)]
    return (parts.index(rows[process]), len(parts)) if all(held in parts for held in rows) else None


def local_rows(array: Any) -> np.ndarray:
    """This process's rows of an array [B, ...] that was computed from a batch which `shard_batch` gave."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    on_rows = jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), BATCH))
    shards = {shard.index[0].start or 0: shard.data for shard in on_rows.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the mesh, leading axis over `data` and `fsdp`."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def batch_shapes(shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a whole batch with the sharding that `shard_batch` gives it."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for name, leaf in shapes.items()}
