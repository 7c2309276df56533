"""What a config's model is made of, without running it: parameters, FLOPs, memory and shapes."""

import json
from collections import Counter
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from rich.console import Console
from rich.table import Table

from xattn import data, interop, models, tasks
from xattn.analysis.flops import count_flops
from xattn.config import Config


def inspect(config: Config) -> dict[str, Any]:
    """Counts the forward pass of one example (for few-shot configs: one episode) in evaluation mode.

    Returns:
      A dict of
      parameters: how many values training changes or loads;
      parameters_released, unused_released: where published weights hold tensors that no forward pass
        uses (and this model leaves out): their total with these, and each of them by name;
      flops_forward: 2 x multiply-adds of matrix products and convolutions, with every key and value projected, as
        papers count (fewer are done where `CrossAttention` absorbs projections);
      memory: bytes of parameters, of Adam's state, of the temporaries of the forward pass as compiled for this
        device, and of all that this pass holds at its peak (parameters, inputs, temporaries, outputs);
      inputs: the shapes it was counted for;
      by_module: the same by module path: `parameters`, `flops`, `output` shapes.
    """
    model = models.build(config.model.to_dict(), dtype=config.dtype)
    task = tasks.build(config.task.to_dict())
    batch = data.batch_shapes(config.data.to_dict(), config.pipeline.to_dict() | {"batch_size": 1})
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    outputs: dict[str, Any] = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            plain = isinstance(result, (jax.Array, tuple, list, dict))
            shown = result if plain else jax.tree.leaves(result)  # of a dataclass, its arrays
            outputs["/".join(context.module.path)] = jax.tree.map(lambda x: list(x.shape), shown)
        return result

    def initialise(batch: Any) -> Any:
        with nn.intercept_methods(record):
            return model.init(rngs, *task.inputs(batch))

    def forward(variables: Any, batch: Any) -> Any:
        return model.apply(variables, *task.inputs(batch))

    def observed(variables: Any, batch: Any) -> Any:
        return model.apply(variables, *task.inputs(batch), mutable=["intermediates"])

    variables = meta.unbox(jax.eval_shape(initialise, batch))
    # With attention weights in view, nothing is absorbed.
    flops = count_flops(observed, variables, batch)
    memory: Any = jax.jit(forward).lower(variables, batch).compile().memory_analysis()
    parameters = _by_prefix(variables["params"])
    unused = interop.unused_released(config.model.to_dict())
    total = parameters[""]
    return {
        "model": config.model.name,
        "parameters": total,
        **({"parameters_released": total + sum(unused.values()), "unused_released": unused} if unused else {}),
        "flops_forward": flops.total(),
        "memory": {
            "parameters": 4 * total,
            "adam_state": 8 * total,
            "forward_temporaries": memory.temp_size_in_bytes,
            "forward_peak": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes,
        },
        "inputs": {name: list(leaf.shape) for name, leaf in batch.items()},
        "by_module": {
            path or "(all)": {"parameters": count, "flops": _flops_below(flops, path), "output": outputs.get(path)}
            for path, count in parameters.items()
        },
    }


def _by_prefix(params: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = [entry.key for entry in path]
        for depth in range(len(names)):
            counts["/".join(names[:depth])] += int(np.prod(leaf.shape, dtype=int))
    return dict(sorted(counts.items()))


def _flops_below(flops: Counter[str], module: str) -> int:
    # A name stack is the class of the outermost module, then submodules, perhaps with ".method", between them einsums
    # and the wrappers that Linen puts around what it scans.
    wanted = module.split("/") if module else []
    total = 0
    for stack, count in flops.items():
        names = iter([name.split(".")[0] for name in stack.split("/")[1:] if "->" not in name])
        if all(name in names for name in wanted):
            total += count
    return total


def show(report: dict[str, Any], as_json: bool) -> None:
    """Prints what `inspect` returned: as one JSON object, or as a table."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table(title=f"{report['model']}, inputs {report['inputs']}")
    for column in ("module", "parameters", "MFLOP", "output"):
        table.add_column(column, justify="left" if column in ("module", "output") else "right")
    for path, row in report["by_module"].items():
        if path.count("/") < 3:
            table.add_row(path, f"{row['parameters']:,}", f"{row['flops'] / 1e6:,.1f}", str(row["output"] or ""))
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    if "unused_released" in report:
        console.print(
            f"{report['parameters']:,} parameters; the published weights hold "
            f"{report['parameters_released']:,}: {sum(report['unused_released'].values()):,} of them "
            f"are read by no forward pass ({', '.join(report['unused_released'])})."
        )
    console.print(
        "memory: "
        + ", ".join(f"{name.replace('_', ' ')} {size / 2**20:.1f} MiB" for name, size in report["memory"].items())
    )
