"""Data: sources of images, text, flow and clips, what is drawn from them, and the streams of batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xattn.config import UsageError, check_options, lookup
from xattn.data.cifar import Cifar10, Cifar100
from xattn.data.clips import ClipFolders, RenderedClips
from xattn.data.digits import Digits
from xattn.data.episodes import EpisodeSampler, ImageSource, fixed_episodes
from xattn.data.flow_files import AutoFlow, FlyingChairs, Kitti, Sintel
from xattn.data.folders import ClassFolders
from xattn.data.glyphs import GlyphFS
from xattn.data.imagenet import Imagenet, ImagenetArrayRecord
from xattn.data.letters import Letters
from xattn.data.pets import Pets
from xattn.data.pipeline import (
    TRANSFORMS,
    ExampleSource,
    episode_batches,
    episode_shapes,
    eval_batches,
    example_batches,
    example_shapes,
)
from xattn.data.planes import MovingPlanes
from xattn.data.text import PythonSources, TextFiles

SOURCES = {
    "autoflow": AutoFlow,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "class_folders": ClassFolders,
    "clip_folders": ClipFolders,
    "digits": Digits,
    "flying_chairs": FlyingChairs,
    "glyphs": GlyphFS,
    "imagenet": Imagenet,
    "imagenet_arrayrecord": ImagenetArrayRecord,
    "kitti": Kitti,
    "letters": Letters,
    "moving_planes": MovingPlanes,
    "pets": Pets,
    "python_sources": PythonSources,
    "rendered_clips": RenderedClips,
    "sintel": Sintel,
    "text_files": TextFiles,
}

# Name: the stream of batches, and the shapes of one batch for examples of given shapes.
PIPELINES = {
    "episodes": (episode_batches, episode_shapes),
    "examples": (example_batches, example_shapes),
}

# Keywords of the streams that the training program gives.
_POSITION = ("source", "start_step", "num_steps", "process_index", "process_count")


def build(config: Mapping[str, Any], split: str) -> Any:
    """The source that `config` describes: its `name` and its constructor's keywords.

    Raises:
      UsageError: there is no such source or keyword, or the source refuses.
    """
    source, options = _source(config)
    return source(split=split, **options)


def batches(source: Any, config: Mapping[str, Any], **position: int | None) -> Iterator[dict[str, np.ndarray]]:
    """The stream that `config` (its `name` and keywords) makes of `source`, from a given position on.

    Raises:
      UsageError: there is no such pipeline or keyword, or it can't be made of this source.
    """
    (stream, _), options = _pipeline(config, type(source), _POSITION)
    return stream(source, **options, **position)


def batch_shapes(data_config: Mapping[str, Any], pipeline_config: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, told without opening the data.

    Raises:
      UsageError: there is no such source, pipeline or keyword, or the two don't fit.
    """
    source, data_options = _source(data_config)
    (_, shapes), options = _pipeline(pipeline_config, source, (*_POSITION, "seed"))
    return shapes(source.shapes(**data_options), **options)


def _source(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    source = lookup(SOURCES, config.get("name"), "data source")
    return source, _options(config, source, "config.data", ("split",))


def _pipeline(config: Mapping[str, Any], source: type, given: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    stream, shapes = lookup(PIPELINES, config.get("name"), "pipeline")
    if not hasattr(source, "images" if stream is episode_batches else "example"):
        other = "examples" if stream is episode_batches else "episodes"
        raise UsageError(
            f"the source '{source.name}' can't be read by the pipeline '{config['name']}': "
            f"set config.pipeline.name to '{other}', or choose another source."
        )
    return (stream, shapes), _options(config, stream, "config.pipeline", given)


def _options(config: Mapping[str, Any], function: Callable, where: str, given: Sequence[str]) -> dict[str, Any]:
    """The keywords in a config, checked; those in `given` are what the program itself passes."""
    options = {key: value for key, value in config.items() if key != "name"}
    check_options(options, function, where, given)
    return options


__all__ = [
    "EpisodeSampler",
    "ExampleSource",
    "ImageSource",
    "PIPELINES",
    "SOURCES",
    "TRANSFORMS",
    "batch_shapes",
    "batches",
    "build",
    "eval_batches",
    "fixed_episodes",
]
