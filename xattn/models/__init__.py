"""Models by name."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict

from xattn.config import check_keys, check_options, lookup
from xattn.layers.positions import FourierPositions, TrainablePositions
from xattn.models import crossvit, vit
from xattn.models.conv4 import Conv4
from xattn.models.crossvit import CrossViT
from xattn.models.perceiver_io import (
    EmbeddingDecoder,
    PerceiverDecoder,
    PerceiverEncoder,
    PerceiverIO,
    ProjectionDecoder,
    Queries,
    perceiver,
)
from xattn.models.perceiver_processors import (
    AudioPostprocessor,
    AudioPreprocessor,
    ImagePostprocessor,
    ImagePreprocessor,
    MultimodalPostprocessor,
    MultimodalPreprocessor,
    OneHotPreprocessor,
    ProjectionPostprocessor,
    TextPreprocessor,
)
from xattn.models.protonet import ProtoNet
from xattn.models.qsformer import CIFE, QSFormer
from xattn.models.resnet12 import ResNet12
from xattn.models.vit import VisionTransformer

MODELS = {
    "cife": CIFE,
    "conv4": Conv4,
    "crossvit": CrossViT,
    "perceiver": perceiver,
    "perceiver_io": PerceiverIO,
    "protonet": ProtoNet,
    "qsformer": QSFormer,
    "resnet12": ResNet12,
    "vit": VisionTransformer,
}
# The published sizes are models too, with keywords that a config may override.
MODELS |= {f"crossvit_{name}": functools.partial(CrossViT, **sizes) for name, sizes in crossvit.VARIANTS.items()}
MODELS |= {name: functools.partial(VisionTransformer, **sizes) for name, sizes in vit.VARIANTS.items()}

PARTS = {
    "audio_postprocessor": AudioPostprocessor,
    "audio_preprocessor": AudioPreprocessor,
    "embedding_decoder": EmbeddingDecoder,
    "fourier_positions": FourierPositions,
    "image_postprocessor": ImagePostprocessor,
    "image_preprocessor": ImagePreprocessor,
    "multimodal_postprocessor": MultimodalPostprocessor,
    "multimodal_preprocessor": MultimodalPreprocessor,
    "one_hot_preprocessor": OneHotPreprocessor,
    "perceiver_decoder": PerceiverDecoder,
    "perceiver_encoder": PerceiverEncoder,
    "projection_decoder": ProjectionDecoder,
    "projection_postprocessor": ProjectionPostprocessor,
    "queries": Queries,
    "text_preprocessor": TextPreprocessor,
    "trainable_positions": TrainablePositions,
}
"""Parts of models by name: what a config may hold inside a model."""

INHERITED = ("attention", "dtype", "variant")
"""Keywords that a part takes over from the config around it, if it has them and leaves them out."""


def build(config: Mapping[str, Any], where: str = "model", **defaults: Any) -> Any:
    """Makes the model of a config.

    Args:
      config: {"name": a name in `MODELS` or `PARTS`, and constructor keywords}. A value that is itself such a mapping
        becomes a module first, and a mapping of such mappings a dict of modules. Parts inherit what `INHERITED` names.
      where: path of `config` in the whole, for messages.
      **defaults: constructor keywords, such as dtype, for each module that has them and whose config leaves them out.

    Raises:
      UsageError: unknown name or keyword.
    """
    keywords = dict(config)
    model = lookup(MODELS | PARTS, keywords.pop("name", None), "model")
    check_keys(keywords, model, where)
    known = set(inspect.signature(model).parameters) - {"parent", "name"}
    keywords = {key: value for key, value in defaults.items() if key in known} | keywords
    inherited = defaults | {key: keywords[key] for key in INHERITED if key in keywords}

    def part(value: Any, path: str) -> Any:
        if _is_config(value):
            return build(value, path, **inherited)
        if isinstance(value, Mapping) and value and all(map(_is_config, value.values())):
            return FrozenDict({key: build(entry, f"{path}.{key}", **inherited) for key, entry in value.items()})
        return FrozenDict(value) if isinstance(value, Mapping) else value  # jit takes hashable models

    keywords = {key: part(value, f"{where}.{key}") for key, value in keywords.items()}
    check_options(keywords, model, where)
    return model(**keywords)


def _is_config(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str)
