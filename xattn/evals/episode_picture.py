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
from matplotlib.patches import Rectangle

from xattn import data, tasks
from xattn.config import Config


def draw_episode(
    model: nn.Module, variables: Mapping[str, Any], config: Config, path: Path, spec: Mapping[str, Any] | None = None
) -> Path:
    """Classifies one 1-shot episode and draws it to `path`.

    The top row is the support set. Each row below belongs to one query: the query, framed green where the prediction
    is right and red where it is wrong, and its weight on each class. For a model with query-to-support attention these
    are the attention weights, averaged over blocks; for others, the softmax of the logits.

    Args:
      model, variables, config: what `xattn.load` gives.
      path: of the picture.
      spec: few-shot evaluation whose split, mode and first seed are taken, with at most 5 ways and 3 queries a class.
    """
    spec = spec or {}
    source = data.build(config.data.to_dict(), split=spec.get("split", "test"))
    ways, queries = min(5, spec.get("ways", 5)), min(3, spec.get("queries", 15))
    seed, mode = spec.get("seed", 0), spec.get("mode", "mixed")
    episode = data.EpisodeSampler(source, seed, ways, 1, queries, mode)(0)
    support, query = source.images(episode["support"]), source.images(episode["query"])
    task = tasks.build(config.task.to_dict())

    @jax.jit
    def classify(batch: Mapping[str, Any]) -> Any:
        return model.apply(variables, *task.inputs(batch), mutable=["intermediates"])

    outputs, captured = classify({"support": support, "query": query})
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
    figure = Figure(figsize=(0.8 * (ways + 1), 0.8 + 0.6 * (rows + 1)), layout="constrained")
    axis = figure.subplots()
    cells = axis.imshow(
        weights, cmap="Blues", vmin=0, vmax=1.5, extent=(0.5, ways + 0.5, rows + 0.5, 0.5), aspect="auto"
    )
    cells.set_zorder(0)
    for column, image in enumerate(support):
        _show(axis, image, column + 1, 0, "black")
    for row in range(rows):
        _show(axis, query[row], 0, row + 1, "tab:green" if predicted[row] == labels[row] else "tab:red")
        for column in range(ways):
            text = f"{weights[row, column]:.2f}" + ("*" if column == labels[row] else "")
            weight = "bold" if column == predicted[row] else "normal"
            axis.text(column + 1, row + 1, text, ha="center", va="center", fontsize=8, fontweight=weight)
    axis.set(xlim=(-0.5, ways + 0.5), ylim=(rows + 0.5, -0.5), xticks=[], yticks=[])
    axis.set_xlabel("support set above, queries on the left")
    right = int((predicted == labels).sum())
    figure.suptitle(f"{title}\n{right} of {rows} right; bold: predicted, *: true class", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _show(axis: Axes, image: np.ndarray, column: int, row: int, frame: str) -> None:
    left, right, top, bottom = column - 0.4, column + 0.4, row - 0.4, row + 0.4
    ink = image.squeeze(-1) if image.shape[-1] == 1 else image
    axis.imshow(ink, cmap="gray_r", extent=(left, right, bottom, top), aspect="auto", zorder=1)
    axis.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=frame, linewidth=2, zorder=2)
    )
