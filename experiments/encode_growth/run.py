"""Time and memory of a Perceiver's encode as its inputs grow: 512 latents of 1024 read 2^14 to 2^18 rows of 261.

    python experiments/encode_growth/run.py

Times are CPU time on one core, all sizes by turns in one process. Memory is how far the resident memory of a fresh
process rises in a warm call, less what the call returns: the latents, or for gradients those of parameters, latents and
inputs. Its allocator gives freed memory back at once, so that it is seen to be taken again. Prints a table and draws
growth.png beside this file.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xattn.bench import peers
from xattn.bench.measure import Program, alternate, jitted, rise_mb
from xattn.bench.runner import environment
from xattn.layers.perceiver import CrossAttend

SIZES = tuple(2**k for k in range(14, 19))
PASSES = ("forward", "gradient")
LINEAR, FLAT = 1.15, 1.2
"""How far the time of an additional row, and memory, may vary over the sizes: largest over smallest."""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def program(what: str, rows: int) -> Program:
    """The encode of `rows` inputs, or its gradient with regard to everything."""
    latents, inputs = peers.normal(1, 512, 1024), peers.normal(1, rows, 261, seed=1)
    model = CrossAttend(num_heads=1)
    params = peers.variables(model, latents, inputs[:, :1])["params"]

    def forward(params: Any, latents: Any, inputs: Any) -> Any:
        return model.apply({"params": params}, latents, inputs)

    def gradient(*arguments: Any) -> Any:
        return jax.grad(lambda *xs: (forward(*xs) ** 2).sum(), (0, 1, 2))(*arguments)

    arrays = jax.tree.map(jnp.asarray, (params, latents, inputs))
    return jitted({"forward": forward, "gradient": gradient}[what], *arrays)


def timed(run: Callable[[], Any]) -> Callable[[], tuple[float, float]]:
    def sample() -> tuple[float, float]:
        began = time.process_time()
        jax.block_until_ready(run())
        return (time.process_time() - began,) * 2

    return sample


def memory_mb(what: str, rows: int) -> float:
    """In a process of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, __file__, "memory", what, str(rows)]
    return float(
        subprocess.run(command, env=clean | GIVES_BACK, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[
            -1
        ]
    )


def print_memory(what: str, rows: int) -> None:
    run = program(what, rows).run
    assert run is not None
    returned = sum(leaf.nbytes for leaf in jax.tree.leaves(run())) / 1e6
    print(rise_mb(run) - returned)


def times(budget_s: float) -> dict[tuple[str, int], float]:
    """Median CPU seconds by pass and size."""
    runs = {f"{what} {rows}": program(what, rows).run for what in PASSES for rows in SIZES}
    for run in runs.values():
        jax.block_until_ready(run())
    rounds = alternate({name: timed(run) for name, run in runs.items()}, budget_s)
    return {
        (what, rows): float(np.median([each.times[f"{what} {rows}"][1] for each in rounds]))
        for what in PASSES
        for rows in SIZES
    }


def main() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    seconds = times(budget_s=40.0)
    memory = {(what, rows): memory_mb(what, rows) for what in PASSES for rows in SIZES}
    print("| pass | rows | seconds | microseconds an additional row | MB above inputs and outputs |")
    print("|---|---|---|---|---|")
    for what in PASSES:
        a_row = np.diff([seconds[what, rows] for rows in SIZES]) / np.diff(SIZES)
        for rows, added in zip(SIZES, ["", *(f"{1e6 * x:.2f}" for x in a_row)], strict=True):
            print(f"| {what} | {rows} | {seconds[what, rows]:.3f} | {added} | {memory[what, rows]:.1f} |")
    for what in PASSES:
        a_row = np.diff([seconds[what, rows] for rows in SIZES]) / np.diff(SIZES)
        held = [memory[what, rows] for rows in SIZES]
        for label, values, bound in (("time of an additional row", a_row, LINEAR), ("memory", held, FLAT)):
            ratio = max(values) / min(values)
            print(f"{what}, {label}: largest / smallest {ratio:.2f} (at most {bound}: {ratio <= bound})")
    plot(seconds, memory)


def plot(seconds: dict[tuple[str, int], float], memory: dict[tuple[str, int], float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for what in PASSES:
        axes[0].loglog(SIZES, [seconds[what, rows] for rows in SIZES], "o-", base=2, label=what)
        axes[1].semilogx(SIZES, [memory[what, rows] for rows in SIZES], "o-", base=2, label=what)
    axes[0].set(xlabel="inputs", ylabel="seconds", title="time, one core")
    axes[1].set(xlabel="inputs", ylabel="MB", title="memory above inputs and outputs", ylim=(0, None))
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(Path(__file__).with_name("growth.png"), dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print_memory(sys.argv[2], int(sys.argv[3]))
    elif "MALLOC_TOP_PAD_" not in os.environ:  # read when a process starts
        sys.exit(subprocess.run([sys.executable, __file__], env=environment("one-core", 1), check=False).returncode)
    else:
        main()
