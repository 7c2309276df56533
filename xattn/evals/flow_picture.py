"""A picture of optical flow, in the colours of the Middlebury benchmark.

The hue tells the direction and the saturation the length: white does not move, red moves right, yellow down, cyan left,
blue up. Longer flow than the scale is drawn darker. (Baker et al., A database and evaluation methodology for optical
flow, IJCV 2011; the authors' `colorcode.cpp`.)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from jaxtyping import Float
from matplotlib.figure import Figure

from xattn import data, tasks
from xattn.config import Config
from xattn.evals.optical_flow import mean_error, predict_flow


def draw_flow(
    model: nn.Module, variables: Mapping[str, Any], config: Config, path: Path, spec: Mapping[str, Any] | None = None
) -> Path:
    """Draws a pair of frames, its true flow and the model's, both in the same colours, to `path`.

    Args:
      model, variables, config: what `xattn.load` gives.
      path: of the picture.
      spec: optical flow evaluation whose split and tiles are taken; the pair is the split's first.
    """
    spec = spec or {}
    source = data.build(config.data.to_dict(), split=spec.get("split", "test"))
    example = source.example(0, None)
    task = tasks.build(config.task.to_dict())
    tiles = {key: spec[key] for key in ("tile", "overlap") if key in spec}
    flow = predict_flow(model, variables, task, example["frames"][None], **tiles)
    error = mean_error(flow, example["flow"][None], example["valid"][None])[0]
    longest = float(np.linalg.norm(example["flow"], axis=-1)[example["valid"]].max())
    y, x = np.mgrid[-1:1:65j, -1:1:65j]
    wheel = np.where(np.hypot(x, y)[..., None] <= 1, flow_colors(np.stack([x, y], -1), 1.0), 1)
    panels = {
        "first frame": example["frames"][0],
        "second frame": example["frames"][1],
        "true flow": flow_colors(example["flow"], longest),
        f"predicted flow\nerror {error:.2f} pixels": flow_colors(flow[0], longest),
        f"colours of directions\nrim: {longest:.1f} pixels": wheel,
    }
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for axis, (title, picture) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def flow_colors(flow: Float[np.ndarray, "*B H W 2"], longest: float | None = None) -> Float[np.ndarray, "*B H W 3"]:
    """RGB in [0, 1] for a flow field.

    Args:
      flow: (x, y), x to the right and y down.
      longest: length that is fully saturated; by default that of the longest vector.
    """
    length = np.linalg.norm(flow, axis=-1)
    length = length / max(length.max() if longest is None else longest, 1e-9)
    wheel = color_wheel()
    turn = (np.arctan2(-flow[..., 1], -flow[..., 0]) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = turn.astype(int)
    part = (turn - low)[..., None]
    hue = (1 - part) * wheel[low] + part * wheel[(low + 1) % len(wheel)]
    length = length[..., None]
    return np.where(length <= 1, 1 - length * (1 - hue), 0.75 * hue)


def color_wheel() -> Float[np.ndarray, "55 3"]:
    """Middlebury's 55 hues: red, yellow, green, cyan, blue, magenta, with as many steps between as the eye tells."""
    corners = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]], float)
    steps = (15, 6, 4, 11, 13, 6)
    return np.concatenate(
        [
            start + np.arange(count)[:, None] / count * (end - start)
            for start, end, count in zip(corners, np.roll(corners, -1, axis=0), steps, strict=True)
        ]
    )
