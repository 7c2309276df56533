"""How well clips come back from the latents, and whether their class does.

    PSNR = -10 log10(mean squared error)          of video in [0, 1] and of audio in [-1, 1], each with peak 1

Pixels and audio patches are decoded in chunks of one encoding, at the coordinates that training uses for its points
(`subsampled_points`). Deviation: the released notebook of Perceiver IO runs the encoder again for each of 128 chunks.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from xattn import data, tasks
from xattn.config import Config, UsageError
from xattn.evals.examples import check_examples, examples_id, on_replicas, open_split, score_examples
from xattn.evals.fewshot import half_width
from xattn.parallel.mesh import local_rows


def autoencoding(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: Config,
    /,
    *,
    split: str = "test",
    num_examples: int | None = None,
    batch_size: int = 8,
    chunks: int = 1,
) -> dict[str, Any]:
    """PSNR and accuracy on `num_examples` clips of a split.

    Args:
      model, variables, config: what `xattn.load` gives.
      split: of the data set of `config.data`.
      num_examples: how many, spread evenly over the split, or None for all.
      batch_size: clips in a call.
      chunks: see `reconstruct`.

    Returns:
      A dict of `image_psnr` and `audio_psnr` in dB, means over clips; `mean_psnr`, that of each clip's mean colour, and
      `silence_psnr`, to compare with; `accuracy` of the label; `ci95`, the half width of the 95% interval of
      `image_psnr`; `image_psnr` clip by clip as `per_example`, and the `examples` they belong to.

    Raises:
      UsageError: see `check_autoencoding`.
    """
    check_autoencoding(model, config, split, num_examples, batch_size, chunks)
    source = open_split(config, split)
    task = tasks.build(config.task.to_dict())

    def score(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (inputs,) = task.inputs(jax.tree.map(jnp.asarray, batch))
        image, audio = np.asarray(inputs["image"]), np.asarray(inputs["audio"])
        outputs = reconstruct(model, variables, task, batch, chunks)
        return {
            "image_psnr": psnr(outputs["image"], image),
            "audio_psnr": psnr(outputs["audio"], audio),
            "mean_psnr": psnr(image.mean((1, 2, 3), keepdims=True), image),
            "silence_psnr": psnr(np.zeros_like(audio), audio),
            "accuracy": outputs["label"].argmax(-1) == batch["label"],
        }

    rows = score_examples(score, source, batch_size, num_examples)
    return {
        "metric": "image_psnr",
        **{name: float(values.mean()) for name, values in rows.items()},
        "ci95": half_width(rows["image_psnr"]),
        "examples": examples_id(config, split, rows["image_psnr"]),
        "per_example": [round(float(value), 6) for value in rows["image_psnr"]],
    }


def check_autoencoding(
    model: nn.Module,
    config: Config,
    split: str = "test",
    num_examples: int | None = None,
    batch_size: int = 8,
    chunks: int = 1,
) -> None:
    """Raises `UsageError` for another task, split or number, or fewer than one chunk."""
    del model
    if chunks < 1:
        raise UsageError(f"chunks is {chunks}: decode in 1 or more.")
    check_examples(config, "autoencoding", split, num_examples, batch_size)


def describe_autoencoding(result: Mapping[str, Any]) -> str:
    """The other metrics, and what needs no model."""
    return (
        f"mean colour {result['mean_psnr']:.2f}; audio {result['audio_psnr']:.2f}, silence "
        f"{result['silence_psnr']:.2f}; top-1 {100 * result['accuracy']:.2f}%"
    )


def draw_clip(
    model: nn.Module, variables: Mapping[str, Any], config: Config, path: Path, spec: Mapping[str, Any] | None = None
) -> Path:
    """Draws the frames and the sound of the first clip of a split, and what comes back of them, to `path`.

    Args:
      model, variables, config: what `xattn.load` gives.
      path: of the picture.
      spec: autoencoding evaluation whose split and chunks are taken.
    """
    spec = spec or {}
    source = data.build(config.data.to_dict(), split=spec.get("split", "test"))
    task = tasks.build(config.task.to_dict())
    batch = {name: value[None] for name, value in source.example(0, None).items()}
    outputs = reconstruct(model, variables, task, batch, spec.get("chunks", 1))
    shown = np.linspace(0, batch["video"].shape[1] - 1, 4).astype(int)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplot_mosaic("abcd;efgh;ssss")
    for frame, above, below in zip(shown, "abcd", "efgh", strict=True):
        axes[above].imshow(batch["video"][0, frame])
        axes[below].imshow(outputs["image"][0, frame])
        axes[above].set(xticks=[], yticks=[], title=f"frame {frame}")
        axes[below].set(xticks=[], yticks=[])
    axes["a"].set_ylabel("clip")
    axes["e"].set_ylabel("decoded")
    axes["s"].plot(batch["audio"][0, :, 0], label="sound", linewidth=1)
    axes["s"].plot(outputs["audio"][0, :, 0], label="decoded", linewidth=1)
    axes["s"].set(xlabel="sample")
    axes["s"].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def reconstruct(
    model: nn.Module, variables: Mapping[str, Any], task: Any, batch: Mapping[str, np.ndarray], chunks: int = 1
) -> dict[str, Float[np.ndarray, "..."]]:
    """Clips as they come back from the latents.

    Args:
      model, variables, task: of autoencoding.
      batch: `video`, `audio` and `label`; the model hides the label.
      chunks: in how many parts the pixels and the audio patches are decoded, so that memory is a part's.

    Returns:
      image [B, T, H, W, 3] in [0, 1], audio [B, S, 1] in [-1, 1], label [B, K] logits.
    """
    video, audio = batch["video"], batch["audio"]
    sizes = {"image": video[0, ..., 0].size, "audio": audio.shape[1] // task.samples_per_patch}
    latents = _encode(model, task, variables, on_replicas(batch))
    parts = [
        _decode(model, variables, latents, dict(zip(sizes, points, strict=True)) | {"label": None})
        for points in zip(*(np.array_split(np.arange(size), chunks) for size in sizes.values()), strict=True)
    ]
    outputs = {name: np.concatenate([local_rows(part[name]) for part in parts], axis=1) for name in sizes}
    return {
        "image": np.clip(outputs["image"], 0, 1).reshape(video.shape),
        "audio": np.clip(outputs["audio"], -1, 1).reshape(audio.shape),
        "label": local_rows(parts[0]["label"]),
    }


def psnr(outputs: Float[np.ndarray, "B ..."], targets: Float[np.ndarray, "B ..."]) -> Float[np.ndarray, "B"]:
    """-10 log10 of the mean squared error of each example, at most 100: the peak is 1."""
    errors = np.square(targets - outputs)
    return -10 * np.log10(np.maximum(errors.mean(tuple(range(1, errors.ndim))), 1e-10))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(model: nn.Module, task: Any, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> Any:
    return model.apply(variables, *task.inputs(batch), method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _decode(model: nn.Module, variables: Mapping[str, Any], latents: Array, points: Mapping[str, Any]) -> Any:
    return model.apply(variables, latents, subsampled_points=points, method="decode")
