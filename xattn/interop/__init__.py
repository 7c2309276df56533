"""Weights in and out: published arrays to models and variables, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from xattn import models
from xattn.config import lookup
from xattn.interop import deepmind_perceiver, hf_perceiver, qsformer, timm_crossvit, timm_vit

KINDS = {
    "hf_perceiver": (hf_perceiver.from_torch, hf_perceiver.to_torch),
    "qsformer": (qsformer.from_torch, qsformer.to_torch),
    "qsformer-encoder": (qsformer.encoder_from_torch, qsformer.encoder_to_torch),
    "timm_crossvit": (timm_crossvit.from_torch, timm_crossvit.to_torch),
    "timm_vit": (timm_vit.from_torch, timm_vit.to_torch),
}
HAIKU_KINDS = {
    "deepmind_perceiver": (deepmind_perceiver.from_haiku, deepmind_perceiver.to_haiku),
}

# Model: parameters of its published weights that no forward pass reads and that it leaves out, name to size.
UNUSED = {
    "qsformer": qsformer.released_parameters,
}


def from_torch(
    kind: str, config: Mapping[str, Any] | str, state_dict: Mapping[str, np.ndarray], **overrides: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Model and variables of published weights; the model reproduces the outputs of its source.

    Args:
      kind: a name in `KINDS`.
      config: the source's own config as a plain dict (for "qsformer", the official command-line arguments; for
        "hf_perceiver", the contents of config.json), or timm's name of the model, such as "crossvit_9_240".
      state_dict: the source's names to numpy arrays.
      **overrides: constructor keywords of the model that should differ from the source, such as attn_axis="tokens".

    Raises:
      UsageError: unknown kind, config key or keyword; missing, surplus or wrongly shaped tensors, each named.
    """
    return lookup(KINDS, kind, "kind of weights")[0](config, state_dict, **overrides)


def to_torch(kind: str, config: Mapping[str, Any] | str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The source's state dict for `variables`: the inverse of `from_torch`, bit by bit.

    What no forward pass reads comes back too, except that "hf_perceiver" sets BatchNorm's counters to zero.
    """
    return lookup(KINDS, kind, "kind of weights")[1](config, variables)


def from_haiku(
    kind: str, name: str, arrays: Mapping[str, np.ndarray], **overrides: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Model and variables of published weights of a Haiku program; the model reproduces the outputs of its source.

    Args:
      kind: a name in `HAIKU_KINDS`.
      name: the published model, such as "language".
      arrays: "module/parameter", such as "embed/embeddings", to numpy arrays, those of Haiku's state among them.
      **overrides: constructor keywords of the model that should differ from the source, such as variant="hf".

    Raises:
      UsageError: unknown kind, name or keyword; missing, surplus or wrongly shaped arrays, each named.
    """
    return lookup(HAIKU_KINDS, kind, "kind of weights")[0](name, arrays, **overrides)


def to_haiku(kind: str, name: str, variables: Mapping[str, Any], **overrides: Any) -> dict[str, np.ndarray]:
    """The source's arrays for `variables`: the inverse of `from_haiku`, with the same overrides, bit by bit."""
    return lookup(HAIKU_KINDS, kind, "kind of weights")[1](name, variables, **overrides)


def unused_released(model_config: Mapping[str, Any]) -> dict[str, int]:
    """Names and sizes of the parameters that published weights of this model hold but no forward pass reads."""
    count = UNUSED.get(model_config["name"])
    return count(models.build(model_config)) if count else {}
