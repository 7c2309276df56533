"""CrossViT of timm and of IBM's released code (arXiv 2103.14899) to xattn and back.

The rows of timm's `attn.qkv` are those of q, k and v one after another, head by head in each. The sizes of the images
and the number of classes are those of the weights. IBM's files name the same tensors, but `pos_embed.0` and
`cls_token.0`, and the same models by the size of the second branch: their crossvit_9_224 is timm's crossvit_9_240.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax.core import meta

from xattn.config import lookup
from xattn.interop.tensors import Rules, read, write
from xattn.interop.timm_vit import SHARED_RULES, image_size, num_classes, tensors
from xattn.models import build
from xattn.models.crossvit import VARIANTS, CrossViT

_NAMES = {f"crossvit_{key}": key for key in VARIANTS}
_OTHER_SIZE = {"240": "224", "408": "384", "504": "480"}
_NAMES |= {re.sub(r"\d+$", lambda size: _OTHER_SIZE[size[0]], name): key for name, key in _NAMES.items()}

_RULES: Rules = [
    (r"^patch_embed_(\d)/proj", r"patch_embed.\1.proj"),
    (r"^patch_embed_(\d)/conv_(\d)", lambda found: f"patch_embed.{found[1]}.proj.{2 * int(found[2])}"),
    (r"^stage_(\d+)", r"blocks.\1"),
    (r"/branch_(\d)/block_", r"/blocks.\1."),
    (r"/(fusion_\d/attn)/(q|k|v)[a-z]+/", r"/\1/w\2/"),
    (r"/fusion_", "/fusion."),
    (r"/proj_(\d)", r"/projs.\1"),
    (r"/revert_(\d)", r"/revert_projs.\1"),
    (r"(projs.\d)/norm", r"\1.0"),
    (r"(projs.\d)/dense", r"\1.2"),
    (r"^(norm|head)_", r"\1."),
    *SHARED_RULES,
]


def from_torch(name: str, state_dict: Mapping[str, np.ndarray], **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Model and variables of a state dict; the model computes what timm does.

    Args:
      name: timm's name, such as "crossvit_9_240", perhaps with its tag, ".in1k"; or IBM's, "crossvit_9_224".
      state_dict: timm's or IBM's names to arrays.
      **overrides: keywords of `CrossViT` that replace those of the model, such as drop_path_rate=0.1.
    """
    model = build(model_config(name, state_dict, **overrides))
    return model, read(tensors(model, model.image_sizes[0], _RULES), _timm_names(state_dict))


def to_torch(name: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """timm's state dict of the variables of a model that `from_torch` could have made."""
    params: Any = meta.unbox(variables["params"])
    sizes = {key: value for key, value in params.items() if key.startswith("pos_embed")}
    if "head_0" in params:
        sizes["head.0.bias"] = params["head_0"]["bias"]
    model = build(model_config(name, sizes))
    return write(tensors(model, model.image_sizes[0], _RULES), variables)


def model_config(name: str, state_dict: Mapping[str, Any] | None = None, **overrides: Any) -> dict[str, Any]:
    """The config of the model for `xattn.models.build`; arguments as of `from_torch`.

    Without a `state_dict` it is the published model.
    """
    key = variant(name)
    config: dict[str, Any] = dict(name=f"crossvit_{key}")
    if state_dict is not None:
        model, state_dict = CrossViT(**VARIANTS[key]), _timm_names(state_dict)
        sizes = enumerate(zip(model.patch_sizes, model.image_sizes, strict=True))
        sides = tuple(image_size(state_dict.get(f"pos_embed_{i}"), patch, size) for i, (patch, size) in sizes)
        config |= dict(num_classes=num_classes(state_dict), image_sizes=sides)
    return config | overrides


def variant(name: str) -> str:
    """The key of `xattn.models.crossvit.VARIANTS` for timm's or IBM's name; `UsageError` if there is none."""
    return lookup(_NAMES, name.partition(".")[0], "CrossViT")


def _timm_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {re.sub(r"^(pos_embed|cls_token)\.", r"\1_", name): x for name, x in state_dict.items()}
