"""What a config's training step costs each device of a mesh, told without the devices.

The step is compiled for simulated CPU devices and not run. Sizes of arguments and outputs are those of any device.
Temporaries and collectives are what XLA's CPU compiler plans: it computes bfloat16 in float32, and reduces gradients
whole where TPUs and GPUs reduce-scatter them.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Column, Table

from xattn import data, models, tasks
from xattn.analysis.collectives import count_collectives
from xattn.config import Config, UsageError, check_keys
from xattn.parallel.mesh import batch_shapes, check_batch, make_mesh, use_mesh
from xattn.train.optim import make_optimizer
from xattn.train.state import abstract_state
from xattn.train.step import make_train_step

# The program is not run: machine code need not be good, which takes LLVM most of the time.
_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes of "data=64,fsdp=4"; axes left out have size 1.

    Raises:
      UsageError: something else than a known axis and a positive number.
    """
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--mesh={text}: write AXIS=SIZE with positive sizes, such as --mesh=data=64,fsdp=4.")
        sizes[axis] = int(size)
    check_keys(sizes, make_mesh, "--mesh")
    return {"data": 1} | sizes


def simulate_devices(count: int) -> None:
    """Sees to it that jax has `count` CPU devices or more; to be called before jax has looked for devices.

    Raises:
      UsageError: jax has looked already, and found fewer.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if len(jax.devices()) < count:
            raise UsageError(
                f"jax has {len(jax.devices())} devices already: ask for {count} in a fresh process."
            ) from error


def lower_step(config: Config, mesh: Mesh) -> tuple[jax.stages.Lowered, Any, dict[str, Any], list[str]]:
    """The training step of `config` as `xattn.train` lowers it on a mesh, without allocating its arrays.

    Returns:
      `(lowered, state, batch, notes)`: what `.compile()` takes on; the shapes with shardings of a state and of a batch;
      what the start of training lists as not sharded.

    Raises:
      UsageError: mesh and batch do not fit.
    """
    check_batch(config.pipeline.batch_size, config.accumulate_steps, mesh)
    model = models.build(config.model.to_dict(), dtype=config.dtype)
    task = tasks.build(config.task.to_dict())
    frozen = getattr(model, "frozen_parameters", ())
    optimizer, schedule = make_optimizer(config.optimizer.to_dict(), config.num_steps, frozen)
    train_step = make_train_step(model, task, optimizer, schedule, config.accumulate_steps, config.ema_decay)
    with use_mesh(mesh):
        batch = batch_shapes(data.batch_shapes(config.data.to_dict(), config.pipeline.to_dict()), mesh)
        _, state, notes = abstract_state(model, task, optimizer, batch, config.ema_decay > 0, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
        return step.lower(state, batch, jax.random.key(0)), state, batch, notes


def step_cost(config: Config, mesh_sizes: Mapping[str, int]) -> dict[str, Any]:
    """Compiles the training step of `config` for a mesh ahead of time, without allocating its arrays.

    Args:
      config: as one of `configs/` gives it; its own mesh is not looked at.
      mesh_sizes: keywords of `make_mesh`; there must be that many devices, perhaps simulated.

    Returns:
      A dict of
      model, mesh, batch_size: the sizes of all axes; examples of the whole batch;
      memory: bytes on one device: `parameters`, `optimizer_state`, `moving_average`, `model_state` and `batch`, which
        with the counters are the `arguments`; `outputs`, of which `outputs_in_place` take the place of arguments;
        `temporaries`; and their `peak`, arguments + outputs - outputs_in_place + temporaries;
      collectives: for each kind its `count`, and the `bytes` that one device sends, as `count_collectives` has them;
      not_sharded: what the start of training lists.

    Raises:
      UsageError: mesh, batch and devices do not fit.
    """
    mesh = make_mesh(**mesh_sizes)
    lowered, state, batch, notes = lower_step(config, mesh)
    compiled: Any = lowered.compile(_COMPILER_OPTIONS)
    memory = compiled.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    return {
        "model": config.model.name,
        "mesh": dict(mesh.shape),
        "batch_size": config.pipeline.batch_size,
        "memory": {
            "parameters": _bytes_on_a_device(state.params),
            "optimizer_state": _bytes_on_a_device(state.opt_state),
            "moving_average": _bytes_on_a_device(state.ema),
            "model_state": _bytes_on_a_device(state.model_state),
            "batch": _bytes_on_a_device(batch),
            "arguments": arguments,
            "outputs": outputs,
            "outputs_in_place": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "peak": arguments + outputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        },
        "collectives": {
            kind: dataclasses.asdict(traffic) for kind, traffic in sorted(count_collectives(compiled.as_text()).items())
        },
        "not_sharded": notes,
    }


def _bytes_on_a_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def show_step_cost(report: Mapping[str, Any], as_json: bool) -> None:
    """Prints what `step_cost` returned: as one JSON object, or as two tables."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    axes = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    console.print(
        f"{report['model']}, a training step on a batch of {report['batch_size']:,}, mesh {axes}. Each device"
    )
    held = Table("holds", Column("MiB", justify="right"))
    for name, size in report["memory"].items():
        held.add_row(name.replace("_", " "), f"{size / 2**20:,.2f}")
    sent = Table("sends", Column("count", justify="right"), Column("MiB", justify="right"))
    for kind, traffic in report["collectives"].items():
        sent.add_row(kind, f"{traffic['count']:,}", f"{traffic['bytes'] / 2**20:,.2f}")
    console.print(held, sent)
    for note in report["not_sharded"]:
        console.print(f"not sharded: {note}")
