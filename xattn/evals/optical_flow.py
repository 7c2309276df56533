"""End-point error of optical flow, over tiles where an image is larger than what the model was trained on.

    flow = sum_t w_t flow_t / sum_t w_t,        w_t(y, x) = 1 + distance of (y, x) to the border of tile t

as the released notebook of Perceiver IO does (deepmind-research/perceiver/colabs), whose last tile of a row ends at the
border of the image. Deviation: it runs some tiles twice (four times for an image of the size of a tile), these do not.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, UInt8

from xattn import tasks
from xattn.config import Config, UsageError
from xattn.evals.examples import check_examples, examples_id, on_replicas, open_split, score_examples
from xattn.evals.fewshot import half_width
from xattn.parallel.mesh import local_rows
from xattn.tasks.optical_flow import FLOW_SCALE


def optical_flow(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: Config,
    /,
    *,
    split: str = "test",
    num_examples: int | None = None,
    batch_size: int = 8,
    tile: tuple[int, ...] | None = None,
    overlap: int = 20,
) -> dict[str, Any]:
    """End-point error on `num_examples` pairs of a split.

    Args:
      model, variables, config: what `xattn.load` gives.
      split: of the data set of `config.data`.
      num_examples: how many, spread evenly over the split, or None for all.
      batch_size: pairs in a call.
      tile, overlap: see `predict_flow`.

    Returns:
      A dict of `epe`, the mean over pairs of the mean distance in pixels between flow and truth over valid pixels
      (pairs without any are left out);
      `zero_epe`, that of saying that nothing moves; `ci95`, the half width of the 95% interval of `epe`; `epe` pair by
      pair as `per_example`, and the `examples` they belong to.

    Raises:
      UsageError: see `check_optical_flow`.
    """
    check_optical_flow(model, config, split, num_examples, batch_size, tile, overlap)
    source = open_split(config, split)
    task = tasks.build(config.task.to_dict())

    def score(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        flow = predict_flow(model, variables, task, batch["frames"], tile, overlap)
        return {
            "epe": mean_error(flow, batch["flow"], batch["valid"]),
            "zero_epe": mean_error(np.zeros_like(flow), batch["flow"], batch["valid"]),
        }

    rows = score_examples(score, source, batch_size, num_examples)
    known = ~np.isnan(rows["zero_epe"])
    if not known.any():
        raise UsageError(
            f"the {len(known)} pairs of '{split}' have no pixel whose flow is known: choose another split."
        )
    rows = {name: values[known] for name, values in rows.items()}
    return {
        "metric": "epe",
        "epe": float(rows["epe"].mean()),
        "ci95": half_width(rows["epe"]),
        "zero_epe": float(rows["zero_epe"].mean()),
        "examples": examples_id(config, split, rows["epe"]),
        "per_example": [round(float(value), 6) for value in rows["epe"]],
    }


def check_optical_flow(
    model: nn.Module,
    config: Config,
    split: str = "test",
    num_examples: int | None = None,
    batch_size: int = 8,
    tile: tuple[int, ...] | None = None,
    overlap: int = 20,
) -> None:
    """Raises `UsageError` for another task, split or number, or tiles that don't fit its images."""
    del model
    check_examples(config, "optical_flow", split, num_examples, batch_size)
    if tile is not None:
        _check_tile(open_split(config, split).example(0, None)["frames"].shape[1:3], tuple(tile), overlap)


def describe_optical_flow(result: Mapping[str, Any]) -> str:
    """The error of saying that nothing moves."""
    return f"zero flow {result['zero_epe']:.2f}"


def predict_flow(
    model: nn.Module,
    variables: Mapping[str, Any],
    task: Any,
    frames: UInt8[np.ndarray, "B 2 H W 3"],
    tile: tuple[int, ...] | None = None,
    overlap: int = 20,
) -> Float[np.ndarray, "B H W 2"]:
    """Flow (x, y) in pixels, averaged over overlapping tiles.

    Args:
      model, variables, task: of optical flow.
      frames: uint8 [B, 2, H, W, 3].
      tile: height and width of what the model sees at once; None shows it whole images.
      overlap: pixels that neighbouring tiles share at least.

    Raises:
      UsageError: the image is smaller than a tile, or the overlap is not.
    """
    size = frames.shape[2:4]
    shape, overlap = (size, 0) if tile is None else (tuple(tile), overlap)
    _check_tile(size, shape, overlap)
    height, width = shape
    weights = tile_weights(height, width)[..., None]
    total, weight = np.zeros((len(frames), *size, 2)), np.zeros((*size, 1))
    for y in tile_starts(size[0], height, overlap):
        for x in tile_starts(size[1], width, overlap):
            rows, columns = slice(y, y + height), slice(x, x + width)
            shown = on_replicas({"frames": frames[:, :, rows, columns]})["frames"]
            flow = _flow(model, task, variables, shown)
            total[:, rows, columns] += weights * local_rows(flow)
            weight[rows, columns] += weights
    return (total / weight).astype(np.float32)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one axis: every `tile - overlap` pixels, the last one flush with the end."""
    return [*range(0, size - tile, tile - overlap), size - tile]


def tile_weights(height: int, width: int) -> Float[np.ndarray, "H W"]:
    """1 at the border of a tile, and 1 more with each pixel of distance from the nearest border."""
    y, x = np.mgrid[:height, :width]
    return np.minimum(np.minimum(y, height - 1 - y), np.minimum(x, width - 1 - x)) + 1.0


def mean_error(
    flow: Float[np.ndarray, "B H W 2"], truth: Float[np.ndarray, "B H W 2"], valid: Bool[np.ndarray, "B H W"]
) -> Float[np.ndarray, "B"]:
    """The mean distance between two flows over the valid pixels of each pair (NaN where there are none)."""
    distance = np.linalg.norm(np.where(valid[..., None], flow - truth, 0), axis=-1)
    count = valid.sum((1, 2))
    return np.where(count, distance.sum((1, 2)) / np.maximum(count, 1), np.nan)


def _check_tile(size: tuple[int, ...], tile: tuple[int, ...], overlap: int) -> None:
    if len(tile) != 2:
        raise UsageError(f"tile is {tile}: give a height and a width.")
    if tile[0] > size[0] or tile[1] > size[1]:
        raise UsageError(
            f"the images are {size[0]} x {size[1]}, smaller than a tile of {tile[0]} x {tile[1]}: "
            "give a smaller tile, or larger images."
        )
    if not 0 <= overlap < min(tile):
        raise UsageError(
            f"tiles of {tile[0]} x {tile[1]} can't overlap by {overlap} pixels: give less than their size."
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _flow(model: nn.Module, task: Any, variables: Mapping[str, Any], frames: Array) -> Array:
    output: Any = model.apply(variables, *task.inputs({"frames": frames}))
    return FLOW_SCALE * output
