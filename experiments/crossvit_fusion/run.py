"""How should CrossViT's branches be fused? The ablation of the paper (arXiv 2103.14899) on letters.

    python experiments/crossvit_fusion/run.py [--seeds=3] [--workdir=DIR]

Trains each way to fuse, another pair of patch sizes, and the coarse branch alone; prints a table and writes
crossvit_fusion.png into the workdir. The same command continues where it was stopped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import xattn
from xattn import data, tasks
from xattn.analysis.inspect import inspect
from xattn.config import Config, cache_compiled_programs, load_config
from xattn.evals.fewshot import half_width
from xattn.train import train

SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each model")
STEPS = flags.DEFINE_integer("steps", 0, "training steps; those of the config by default")
WORKDIR = flags.DEFINE_string("workdir", "runs/crossvit_fusion", "folder of the runs and of the picture")

REFERENCE = "cross-attention, 8 + 16"
MODELS: dict[str, dict[str, Any]] = {
    REFERENCE: dict(fusion="cross_attention"),
    "none, 8 + 16": dict(fusion="none"),
    "all-attention, 8 + 16": dict(fusion="all_attention"),
    "class token, 8 + 16": dict(fusion="class_token"),
    "pairwise, 8 + 16": dict(fusion="pairwise"),
    "cross-attention, 4 + 16": dict(patch_sizes=(4, 16)),
    "coarse branch alone, 16": dict(name="vit"),
}
"""Name in the table: what differs in the model of `crossvit/letters`."""


def main(_: list[str]) -> None:
    """Trains, compares image by image, prints the table and draws the picture."""
    logging.set_verbosity(logging.WARNING)
    cache_compiled_programs()
    workdir = Path(WORKDIR.value)
    runs = {name: [run(name, seed, workdir) for seed in range(SEEDS.value)] for name in MODELS}
    correct = {name: np.array([row["both"] for row in rows]) for name, rows in runs.items()}  # [seed, image]

    table = Table(title=f"Test accuracy on letters, %: mean of {SEEDS.value} seeds")
    for column in ("fusion, patches", "accuracy", "each seed", "minus cross-attention", "fine", "coarse", "MFLOP"):
        table.add_column(column)
    for name, rows in runs.items():
        gaps = 100 * (correct[name] - correct[REFERENCE]).mean(0)
        own = [100 * np.mean([row[branch] for row in rows]) if branch in rows[0] else None for branch in BRANCHES]
        table.add_row(
            name,
            f"{100 * correct[name].mean():.2f}",
            " ".join(f"{100 * row.mean():.2f}" for row in correct[name]),
            "" if name == REFERENCE else f"{gaps.mean():+.2f} +- {half_width(gaps):.2f}",
            *("" if value is None else f"{value:.2f}" for value in own),
            f"{inspect(make_config(name, seed=0))['flops_forward'] / 1e6:.1f}",
        )
    Console(width=130).print(table)
    print(f"picture: {draw(correct, workdir / 'crossvit_fusion.png')}")


BRANCHES = ("fine", "coarse")


def run(name: str, seed: int, workdir: Path) -> dict[str, Any]:
    """Trains one run: 0 or 1 for each test image by `both` branches and, of two, by the logits of each alone."""
    config = make_config(name, seed)
    folder = workdir / f"{name.replace(',', '').replace(' + ', '_').replace(' ', '_')}_{seed}"
    result = {"both": train(config, folder)["letters"]["per_example"]}
    if config.model.name == "crossvit":
        result |= branches(folder)
    return result


def make_config(name: str, seed: int) -> Config:
    """The config of a model of the table."""
    config = load_config("crossvit/letters").unlock()
    config.seed = seed
    config.num_steps = STEPS.value or config.num_steps
    if MODELS[name].get("name") == "vit":
        model = config.model
        config.model = dict(
            name="vit",
            num_classes=model.num_classes,
            image_size=model.image_sizes[1],
            patch_size=model.patch_sizes[1],
            features=model.features[1],
            num_heads=model.num_heads[1],
            depth=model.depths[1] * model.num_stages,
            mlp_ratio=model.mlp_ratio,
            drop_path_rate=model.drop_path_rate,
        )
    else:
        config.model.update(MODELS[name])
    return config.lock()


def branches(folder: Path) -> dict[str, list[float]]:
    """0 or 1 for each test image by the logits of one branch."""
    model, variables, config = xattn.load(folder)
    task = tasks.build(config.task.to_dict())

    @jax.jit
    def right(batch: Mapping[str, Any]) -> jax.Array:
        _, state = model.apply(
            variables,
            *task.inputs(batch),
            capture_intermediates=lambda module, _: (module.name or "").startswith("head_"),
            mutable=["intermediates"],
        )
        heads = [state["intermediates"][f"head_{i}"]["__call__"][0] for i in range(len(BRANCHES))]
        return jnp.stack([head.argmax(-1) == batch["label"] for head in heads], -1)

    rows = []
    for batch in data.eval_batches(data.build(config.data.to_dict(), split="test"), batch_size=500):
        present = batch.pop("present")
        rows.append(np.asarray(right(batch))[present])
    columns = np.concatenate(rows).T.astype(float)
    return {name: column.tolist() for name, column in zip(BRANCHES, columns, strict=True)}


def draw(correct: dict[str, np.ndarray], path: Path) -> Path:
    """Accuracies of all runs, one row a model."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis = figure.subplots()
    for row, values in enumerate(correct.values()):
        seeds = 100 * values.mean(-1)
        axis.plot(seeds, [row] * len(seeds), "o", color="tab:blue", alpha=0.6)
        axis.plot(seeds.mean(), row, "|", color="black", markersize=14)
    axis.set(yticks=range(len(correct)), yticklabels=list(correct), xlabel="test accuracy, %")
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    app.run(main)
