"""A picture of one few-shot episode: its support set, its queries with their predictions, and what they attend to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xattn import data, tasks
from xattn.config import Config


def draw_episode(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: Config,
    path: Path,
    *,
    split: str = "test",
    seed: int = 0,
    ways: int = 5,
    queries: int = 3,
) -> Path:
    """Classifies one 1-shot episode and draws it to `path`.

    The top row is the support set. Each row below belongs to one query: the query, framed green where the prediction
    is right and red where it is wrong, and its weight on each class. For a model with query-to-support attention these
    are the attention weights, averaged over blocks; for others, the softmax of the logits.

    Args:
      model, variables, config: what `xattn.load` gives.
      split, seed, ways, queries: the episode; `queries` of each class.
    """
    source = data.build(config.data.to_dict(), split=split)
    episode = data.EpisodeSampler(source, seed, ways, 1, queries)(0)
    support, query = source.images(episode["support"]), source.images(episode["query"])
    inputs = tasks.build(config.task.to_dict()).inputs(
        {"support": jax.numpy.asarray(support), "query": jax.numpy.asarray(query)}
    )
    outputs, captured = model.apply(variables, *inputs, mutable=["intermediates"])
    weights, title = _weights(outputs, captured.get("intermediates", {}))
    _draw(support[:, 0], query, episode["query_labels"], np.asarray(outputs["logits"]).argmax(-1), weights, title, path)
    return path


def _weights(outputs: Mapping[str, Any], captured: Mapping[str, Any]) -> tuple[np.ndarray, str]:
    blocks = [
        block["attention_weights"][0][..., 0, :, :] for name, block in captured.items() if name.startswith("block_")
    ]
    if blocks:
        return np.asarray(sum(blocks) / len(blocks)), f"query-to-support attention, mean of {len(blocks)} block(s)"
    return np.asarray(jax.nn.softmax(outputs["logits"])), "softmax of the logits"


def _draw(
    support: np.ndarray,
    query: np.ndarray,
    labels: Int[np.ndarray, "Q"],
    predicted: Int[np.ndarray, "Q"],
    weights: Float[np.ndarray, "Q N"],
    title: str,
    path: Path,
) -> None:
    ways, rows = len(support), len(query)
    figure = Figure(figsize=(1.0 + 0.8 * ways, 0.8 + 0.55 * rows), layout="constrained")
    grid = figure.subplots(rows + 1, ways + 1, squeeze=False)
    grid[0, 0].axis("off")
    grid[0, 0].text(0.5, 0.5, "query \\ support", ha="center", va="center", fontsize=7)
    for column, image in enumerate(support):
        _show(grid[0, column + 1], image, "black")
    for row in range(rows):
        _show(grid[row + 1, 0], query[row], "tab:green" if predicted[row] == labels[row] else "tab:red")
        for column in range(ways):
            axis, weight = grid[row + 1, column + 1], weights[row, column]
            axis.set(xticks=[], yticks=[], facecolor=(1 - 0.8 * weight, 1 - 0.5 * weight, 1.0))
            mark = "*" if column == labels[row] else ""
            chosen = "bold" if column == predicted[row] else "normal"
            axis.text(0.5, 0.5, f"{weight:.2f}{mark}", ha="center", va="center", fontsize=8, fontweight=chosen)
    right = int((predicted == labels).sum())
    figure.suptitle(f"{title}\n{right} of {rows} right; bold: predicted, *: true class", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _show(axis: Axes, image: np.ndarray, frame: str) -> None:
    axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray_r" if image.shape[-1] == 1 else None)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=frame, linewidth=2)
