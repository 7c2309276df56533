"""What the two sources of Perceiver IO weights share: a table of tensors from the leaves of a model and their names."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xattn.interop.tensors import Rules, Tensor, of_model
from xattn.models import build


def merge(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with other keywords; a mapping, such as encoder=dict(remat=True), changes a part of it."""
    merged = dict(config)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def table(config: Mapping[str, Any], rules: Rules, torch: bool) -> dict[str, Tensor]:
    """The tensors of a model's config by the source's names; `torch` as of `of_leaf`."""
    return of_model(build(config), rules, torch, **_inputs(config))


def _inputs(config: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of some size that the model takes: parameters depend on it where positions are trained, and only there."""
    preprocessor = config["input_preprocessor"]
    modalities = preprocessor.get("modalities")
    if modalities is None:
        return {"inputs": _input(preprocessor, 0)}
    classes = config["output_postprocessor"]["modalities"]["label"]["features"]
    points = {name: None if name == "label" else jax.ShapeDtypeStruct((1,), jnp.int32) for name in modalities}
    return {"inputs": {name: _input(part, classes) for name, part in modalities.items()}, "subsampled_points": points}


def _input(preprocessor: Mapping[str, Any], classes: int) -> jax.ShapeDtypeStruct:
    if preprocessor["name"] == "text_preprocessor":
        return jax.ShapeDtypeStruct((1, preprocessor["max_positions"]), jnp.int32)
    if preprocessor["name"] == "image_preprocessor":
        size = preprocessor["positions"].get("index_dims", (8, 8))
        flow = preprocessor.get("temporal_downsample") == 2
        video = len(preprocessor["positions"].get("max_resolution", size)) == 3
        shape = (2, *size, 27) if flow else (2, *size, 3) if video else (*size, 3)
    else:
        shape = (classes,) if preprocessor["name"] == "one_hot_preprocessor" else (preprocessor["samples_per_patch"], 1)
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)
