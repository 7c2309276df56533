"""timm's plain vision transformers (ViT, DeiT; arXiv 2010.11929, 2012.12877) to xattn and back.

The rows of timm's `attn.qkv` are those of q, k and v one after another, head by head in each. The size of the images
and the number of classes are those of the weights.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from xattn.config import lookup
from xattn.interop.tensors import Rules, Tensor, of_model, read, stacked, write
from xattn.models import build
from xattn.models.vit import VARIANTS, VisionTransformer


def from_torch(name: str, state_dict: Mapping[str, np.ndarray], **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Model and variables of a state dict; the model computes what timm does.

    Args:
      name: timm's name, such as "deit_tiny_patch16_224", perhaps with its tag, ".fb_in1k".
      state_dict: timm's names to arrays.
      **overrides: keywords of `VisionTransformer` that replace those of the model, such as drop_path_rate=0.1.
    """
    model = build(model_config(name, state_dict, **overrides))
    return model, read(tensors(model, model.image_size, _RULES), state_dict)


def to_torch(name: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of the variables of a model that `from_torch` could have made."""
    params: Any = meta.unbox(variables["params"])
    sizes = {"pos_embed": params["pos_embed"]}
    if "head" in params:
        sizes["head.bias"] = params["head"]["bias"]
    model = build(model_config(name, sizes))
    return write(tensors(model, model.image_size, _RULES), variables)


def model_config(name: str, state_dict: Mapping[str, Any] | None = None, **overrides: Any) -> dict[str, Any]:
    """The config of the model for `xattn.models.build`; arguments as of `from_torch`.

    Without a `state_dict` it is the published model.
    """
    name = variant(name)
    config: dict[str, Any] = dict(name=name)
    if state_dict is not None:
        model = VisionTransformer(**VARIANTS[name])
        side = image_size(state_dict.get("pos_embed"), model.patch_size, model.image_size)
        config |= dict(num_classes=num_classes(state_dict), image_size=side)
    return config | overrides


def variant(name: str) -> str:
    """The key of `xattn.models.vit.VARIANTS` for timm's name; `UsageError` if there is none."""
    name = name.partition(".")[0]
    lookup(VARIANTS, name, "vision transformer")
    return name


# What follows serves CrossViT, too.

SHARED_RULES: Rules = [
    (r"/attn/query/", "/attn/qkv.0/"),
    (r"/attn/key/", "/attn/qkv.1/"),
    (r"/attn/value/", "/attn/qkv.2/"),
    (r"/attn/out/", "/attn/proj/"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/", "."),
]

_RULES: Rules = [
    (r"^patch_embed/conv_(\d)", lambda found: f"patch_embed/proj.{2 * int(found[1])}"),
    (r"^block_", "blocks."),
    *SHARED_RULES,
]


def tensors(model: nn.Module, size: int, rules: Rules) -> dict[str, Tensor]:
    """timm's tensors of a model of size x size images; `rules` end with `SHARED_RULES`, and q, k and v become one."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    parts = defaultdict(list)
    for name, tensor in sorted(of_model(model, rules, torch=True, images=images).items()):
        parts[re.sub(r"\.qkv\.\d", ".qkv", name)].append(tensor)
    return {name: stacked(group) for name, group in parts.items()}


def image_size(positions: Any, patch_size: int, published: int) -> int:
    """Side of the images that have these positions [1, 1 + n^2, C]; `published` if they are missing or no square."""
    patches = positions.shape[1] - 1 if positions is not None and positions.ndim == 3 else 0
    side = math.isqrt(patches)
    return patch_size * side if side and side**2 == patches else published


def num_classes(state_dict: Mapping[str, Any]) -> int:
    """Classes of the first tensor of a head; 0 if there is none."""
    return next((len(x) for name, x in state_dict.items() if name.startswith("head.")), 0)
