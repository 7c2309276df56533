"""Models by name."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from xattn.config import check_keys, lookup
from xattn.models.conv4 import Conv4
from xattn.models.protonet import ProtoNet
from xattn.models.qsformer import CIFE, QSFormer
from xattn.models.resnet12 import ResNet12

MODELS = {
    "cife": CIFE,
    "conv4": Conv4,
    "protonet": ProtoNet,
    "qsformer": QSFormer,
    "resnet12": ResNet12,
}


def build(config: Mapping[str, Any], where: str = "model", **defaults: Any) -> nn.Module:
    """Makes the model of a config.

    Args:
      config: {"name": a name in `MODELS`, and constructor keywords}. A value that is itself such a mapping becomes a
        module first.
      where: path of `config` in the whole, for messages.
      **defaults: constructor keywords, such as dtype, for each module that has them and whose config leaves them out.

    Raises:
      UsageError: unknown name or keyword.
    """
    keywords = dict(config)
    model = lookup(MODELS, keywords.pop("name"), "model")
    check_keys(keywords, model, where)
    for key, value in keywords.items():
        if isinstance(value, Mapping) and "name" in value:
            keywords[key] = build(value, f"{where}.{key}", **defaults)
    known = {field for field in model.__dataclass_fields__ if field not in ("parent", "name")}
    return model(**{key: value for key, value in defaults.items() if key in known} | keywords)
