"""Does Perceiver IO need neighbouring pixels to lie beside each other? Trains it on digits with and without that.

    python experiments/permuted_pixels/run.py [--config=perceiver_io/imagenet_fourier] [--seeds=3] [--workdir=DIR]

Prints a table and writes permuted_pixels.png into the workdir. The same command continues where it was stopped.
"""

from pathlib import Path

import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from xattn import data
from xattn.config import cache_compiled_programs, load_config
from xattn.evals.fewshot import half_width
from xattn.train import train

CONFIG = flags.DEFINE_string("config", "perceiver_io/imagenet_fourier", "config with the variants digits(_permuted)")
SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each variant")
WORKDIR = flags.DEFINE_string("workdir", "runs/permuted_pixels", "folder of the runs and of the picture")
VARIANTS = {"digits": "as they are", "digits_permuted": "permuted"}


def main(_: list[str]) -> None:
    """Trains, compares image by image, prints the table and draws the picture."""
    logging.set_verbosity(logging.WARNING)
    cache_compiled_programs()
    workdir = Path(WORKDIR.value)
    correct = np.array([[run(variant, seed, workdir) for variant in VARIANTS] for seed in range(SEEDS.value)])

    accuracy = 100 * correct.mean(-1)  # [seed, variant]
    gaps = 100 * (correct[:, 1] - correct[:, 0])  # [seed, image]
    table = Table(title=f"{CONFIG.value}: test accuracy on digits, %")
    for column in ("seed", *(f"pixels {name}" for name in VARIANTS.values()), "paired difference, points"):
        table.add_column(column)
    for seed in range(SEEDS.value):
        table.add_row(str(seed), *map("{:.2f}".format, accuracy[seed]), _difference(gaps[seed]))
    table.add_row("mean", *map("{:.2f}".format, accuracy.mean(0)), _difference(gaps.mean(0)), style="bold")
    Console(width=100).print(table)
    print(f"picture: {draw(accuracy, workdir / 'permuted_pixels.png')}")


def run(variant: str, seed: int, workdir: Path) -> list[float]:
    """Trains one run; 0 or 1 for each test image."""
    config = load_config(f"{CONFIG.value}:{variant}")
    config.seed = seed
    return train(config, workdir / f"{variant}_{seed}")["digits"]["per_example"]


def draw(accuracy: np.ndarray, path: Path) -> Path:
    """Three digits as both variants see them, and the accuracies of all runs."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplot_mosaic([["d0", "d1", "d2", "runs"], ["p0", "p1", "p2", "runs"]], width_ratios=[1, 1, 1, 3])
    for row, variant in zip("dp", VARIANTS, strict=True):
        source = data.build(load_config(f"{CONFIG.value}:{variant}").data.to_dict(), split="test")
        for column in range(3):
            axis = axes[f"{row}{column}"]
            axis.imshow(source.example(column, None)["image"][..., 0], cmap="gray_r")
            axis.set(xticks=[], yticks=[])
    for values in accuracy:
        axes["runs"].plot(list(VARIANTS.values()), values, marker="o", color="tab:blue", alpha=0.6)
    axes["runs"].set(ylabel="test accuracy, %", xlim=(-0.5, 1.5))
    axes["runs"].grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def _difference(gaps: np.ndarray) -> str:
    return f"{gaps.mean():+.2f} +- {half_width(gaps):.2f}"


if __name__ == "__main__":
    app.run(main)
