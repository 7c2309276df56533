"""Data: sources of images, episodes drawn from them, and the stream of batches."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from xattn.config import check_keys, lookup
from xattn.data.episodes import EpisodeSampler, ImageSource, fixed_episodes
from xattn.data.folders import ClassFolders
from xattn.data.glyphs import GlyphFS
from xattn.data.pipeline import episode_batches, episode_shapes

SOURCES = {
    "class_folders": ClassFolders,
    "glyphs": GlyphFS,
}

# Name: the stream of batches, and the shapes of one batch for images of a given shape.
PIPELINES = {
    "episodes": (episode_batches, episode_shapes),
}


def build(config: Mapping[str, Any], split: str) -> ImageSource:
    """The source that `config` describes: its `name` and its constructor's keywords."""
    options = dict(config)
    source = lookup(SOURCES, options.pop("name"), "data source")
    check_keys(options, source, "config.data")
    return source(split=split, **options)


def batches(source: ImageSource, config: Mapping[str, Any], **position: int | None) -> Iterator[dict[str, np.ndarray]]:
    """The stream that `config` (its `name` and keywords) makes of `source`, from a given position on."""
    options = dict(config)
    stream, _ = lookup(PIPELINES, options.pop("name"), "pipeline")
    check_keys(options, stream, "config.pipeline")
    return stream(source, **options, **position)


def batch_shapes(data_config: Mapping[str, Any], pipeline_config: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, told without opening the data."""
    options = dict(data_config)
    source = lookup(SOURCES, options.pop("name"), "data source")
    _, shapes = lookup(PIPELINES, pipeline_config["name"], "pipeline")
    size = options.get("image_size", source.image_size)
    return shapes(
        image_shape=(size, size, source.channels), **{k: v for k, v in pipeline_config.items() if k != "name"}
    )


__all__ = [
    "EpisodeSampler",
    "ImageSource",
    "PIPELINES",
    "SOURCES",
    "batch_shapes",
    "batches",
    "build",
    "fixed_episodes",
]
