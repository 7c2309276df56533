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
from rich.console import Console
from rich.table import Column, Table

from xattn.analysis.collectives import count_collectives, gathered_at_once
from xattn.config import Config, UsageError, check_keys
from xattn.parallel.mesh import make_mesh
from xattn.train.plan import check_layout, make_plan

# The program is not run: machine code need not be good, which takes LLVM most of the time.
_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Where parameters are gathered, a CPU would begin with all gathers, to have more to do at one time. Ordered so that
# little is held, as on accelerators, each comes before its use.
GATHERING_OPTIONS = _COMPILER_OPTIONS | {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


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
        `temporaries`, of which `gathered_at_once` are what other devices hold parts of; and the
        `peak`, arguments + outputs - outputs_in_place + temporaries;
      collectives: for each kind its `count`, and the `bytes` that one device sends, as `count_collectives` has them;
      not_sharded: what the start of training lists.

    Raises:
      UsageError: mesh, batch and devices do not fit.
    """
    mesh = make_mesh(**mesh_sizes)
    check_layout(config, mesh)
    plan = make_plan(config, mesh)
    state = plan.state
    compiled = plan.lowered.compile(GATHERING_OPTIONS if mesh.shape["fsdp"] > 1 else _COMPILER_OPTIONS)
    program, memory = compiled.as_text(), compiled.memory_analysis()
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
            "batch": _bytes_on_a_device(plan.batch),
            "arguments": arguments,
            "outputs": outputs,
            "outputs_in_place": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "gathered_at_once": gathered_at_once(program),
            "peak": arguments + outputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        },
        "collectives": {
            kind: dataclasses.asdict(traffic) for kind, traffic in sorted(count_collectives(program).items())
        },
        "not_sharded": plan.notes,
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
