"""What must be reached, and whether it was: `--check` asserts this table."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FOREIGN = 0.08
"""Share of the cores that other processes may take in a round whose wall-clock times are used."""
ENOUGH = 5
"""Rounds that are needed for a verdict."""
SPREAD = 1.25
"""Ratio of the quartiles of a goal's value over the rounds, above which there is no verdict."""


class Goal(NamedTuple):
    """`metric` of `row` is at most `max`.

    Attributes:
      workload, case: the block of the table.
      row: one of ours.
      against: the row whose value divides; "" for a value that stands for itself.
      metric: "time"; "of_cores" for time x threads; or a key of a row's result: "temp_mb", "peak_mb", "sent_mb",
        "collectives", "of_formula", "recompiled", "over_floor" (time over the floor's).
      max: the bound.
      on: "cpu", or "device" for an accelerator.
    """

    workload: str
    case: str
    row: str
    against: str
    metric: str
    max: float
    on: str = "cpu"


_JAX = "jax.nn.dot_product_attention"

GOALS = (
    Goal("W1", "forward", "xattn", "torch sdpa", "time", 0.62),
    Goal("W1", "forward", "xattn", "plain jnp", "time", 0.88),
    Goal("W1", "forward", "xattn bf16", "torch sdpa", "time", 0.50),
    Goal("W1", "cached K/V", "xattn", "torch sdpa", "time", 0.62),
    Goal("W1", "core", "xattn", "plain jnp", "time", 0.70),
    Goal("W1", "core", "xattn", "torch sdpa", "time", 0.85),
    Goal("W1", "core", "xattn", "cudnn", "time", 1.03, "device"),
    Goal("W1", "core", "xattn", _JAX, "time", 1.03, "device"),
    Goal("W1", "gradients", "xattn", "torch sdpa", "time", 0.75),
    Goal("W1", "gradients", "xattn", "plain jnp", "time", 0.80),
    Goal("W1", "gradients", "xattn", "plain jnp", "temp_mb", 0.60),
    Goal("W1", "long core", "xattn", "cudnn", "time", 1.03, "device"),
    Goal("W1", "long core", "xattn", _JAX, "time", 1 / 3, "device"),
    Goal("W3", "training step of vit_small_patch16_224", "xattn", "", "over_floor", 1 / 0.40, "device"),
    Goal("W5", "forward", "xattn ResNet-12", "torch channels_last", "time", 1.0, "device"),
    Goal("W5", "training step", "xattn ResNet-12", "torch channels_last", "time", 1.0, "device"),
    Goal("W2", "encode", "xattn", "torch sdpa", "time", 0.35),
    Goal("W2", "encode", "xattn", "plain jnp", "time", 0.50),
    Goal("W2", "encode", "xattn", "", "peak_mb", 8.0),
    Goal("W2", "image", "xattn", "transformers", "time", 0.60),
    Goal("W3", "inference", "xattn", "timm", "time", 0.65),
    Goal("W3", "inference", "xattn bf16", "timm", "time", 0.45),
    Goal("W3", "training step", "xattn", "timm", "time", 0.75),
    Goal("W4", "rerank", "xattn joint", "torch joint", "time", 0.62),
    Goal("W4", "rerank", "xattn joint bf16", "torch joint", "time", 0.40),
    Goal("W4", "rerank", "xattn cross-only", "torch joint", "time", 0.115),
    Goal("W4", "rerank", "xattn cross-only", "torch cross-only", "time", 0.68),
    Goal("W5", "forward", "xattn ResNet-12", "torch channels_last", "time", 1.45),
    Goal("W5", "training step", "xattn ResNet-12", "torch channels_last", "time", 2.2),
    Goal("W6", "forward", "xattn gather", "", "sent_mb", 1.88),
    Goal("W6", "forward", "xattn gather", "", "collectives", 5),
    Goal("W6", "forward", "xattn gather", "", "temp_mb", 40.0),
    Goal("W6", "forward", "xattn ring (LV-XAttn)", "", "of_formula", 1.01),
    Goal("W6", "forward and backward", "xattn gather", "", "sent_mb", 3.73),
    Goal("W6", "forward and backward", "xattn gather", "", "collectives", 5),
    Goal("W6", "forward and backward", "xattn gather", "", "temp_mb", 40.0),
    Goal("W6", "forward and backward", "xattn ring (LV-XAttn)", "", "of_formula", 1.01),
    # The pipeline's goals are rates, 1.28 of plain's and 0.95 of cores x one thread's: here, times an image.
    Goal("W7a", "crop and mirror", "xattn fast", "plain grain + Pillow", "time", 1 / 1.28),
    Goal("W7a", "crop and mirror", "xattn fast", "xattn fast, one thread", "of_cores", 1 / 0.95),
    Goal("W7b", "first step", "scan", "loop", "time", 0.55),
    Goal("W7b", "first step", "scan, cached", "loop", "time", 0.20),
    Goal("W7b", "first step", "scan, cached", "", "recompiled", 0),
)


class Round(NamedTuple):
    """Every row measured once: (wall seconds, CPU seconds) by row, and the share that other processes took."""

    times: Mapping[str, tuple[float, float]]
    foreign: float


def usable(rounds: Sequence[Round], mode: str) -> tuple[Sequence[Round], bool]:
    """The rounds to take numbers from, and whether they are enough for a verdict.

    One core's CPU time stands whatever else runs; wall-clock times need a quiet machine. Where too few rounds were
    quiet, all of them are taken.
    """
    quiet = rounds if mode == "one-core" else [each for each in rounds if each.foreign < FOREIGN]
    enough = len(quiet) >= ENOUGH
    return (quiet if enough else rounds), enough


def statistics(rounds: Sequence[Round], name: str, baseline: str, mode: str) -> dict[str, float]:
    """Ratios of a row to the baseline, and its times in milliseconds.

    `ratio` and `rcpu` are ratios of medians, of wall and of CPU time; `rmin` is that of the smallest wall times; `q1`
    and `q3` are quartiles of the ratio in each round, of CPU times in one-core mode, else of wall times.
    """
    wall, cpu, wall_base, cpu_base = (
        np.array([each.times[row][clock] for each in rounds]) for row in (name, baseline) for clock in (0, 1)
    )
    each_round = cpu / np.maximum(cpu_base, 1e-9) if mode == "one-core" else wall / wall_base
    q1, q3 = np.percentile(each_round, (25, 75))
    return {
        "ratio": np.median(wall) / np.median(wall_base),
        "q1": q1,
        "q3": q3,
        "rmin": wall.min() / wall_base.min(),
        "rcpu": np.median(cpu) / max(np.median(cpu_base), 1e-9),
        "med_ms": 1e3 * np.median(wall),
        "min_ms": 1e3 * wall.min(),
        "cpu_ms": 1e3 * np.median(cpu),
    }


def verdict(
    goal: Goal, rows: Mapping[str, Mapping[str, Any]], rounds: Sequence[Round], mode: str, threads: int
) -> dict[str, Any]:
    """{"row", "vs", "metric", "max", "value", "verdict"}, the last of pass, fail, noisy, n/a.

    Args:
      rows: results by name, with their `status`.
      rounds: all of them.
      mode: decides whether wall or CPU times are compared.
      threads: for "of_cores".
    """
    found = {"row": goal.row, "vs": goal.against, "metric": goal.metric, "max": goal.max, "value": None}
    statuses = [rows.get(name, {}).get("status", "absent") for name in (goal.row, goal.against) if name]
    if "mismatch" in statuses or statuses[0] == "oom":
        return found | {"verdict": "fail"}
    if set(statuses) != {"ok"}:
        return found | {"verdict": "n/a"}
    noisy = False
    if goal.metric in ("time", "of_cores"):
        used, enough = usable(rounds, mode)
        ratios = statistics(used, goal.row, goal.against, mode)
        value = ratios["rcpu" if mode == "one-core" else "ratio"]
        value *= threads if goal.metric == "of_cores" else 1
        noisy = not enough or ratios["q3"] > SPREAD * ratios["q1"]
    else:
        value, base = rows[goal.row].get(goal.metric), rows[goal.against].get(goal.metric) if goal.against else 1
        if value is None or not base:
            return found | {"verdict": "n/a"}
        noisy = goal.metric == "over_floor" and not usable(rounds, mode)[1]
        value /= base
    return found | {"value": value, "verdict": "noisy" if noisy else "pass" if value <= goal.max else "fail"}
