"""QSFormer's released weights (code SissiW/QSFormer, arXiv 2208.12398) to xattn and back.

The files hold {"params": state_dict} of a DataParallel wrapper, hence `module.` before each key; a pre-training file
may hold the image encoder alone, without `encoder.`. Tensors that no forward pass of the released code reads have no
place in our parameters. Where they differ from their initial constants they are kept in the collection "released",
which the model ignores, so that the way back gives every bit again.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from xattn.config import UsageError, check_keys, lookup
from xattn.interop.tensors import Tensor, batch_norm, conv, linear, norm, read, vector, write
from xattn.models import build
from xattn.models.qsformer import CIFE, VARIANTS, QSFormer
from xattn.models.resnet12 import ResNet12

PREPROCESSING = dict(
    resize=92,
    crop=84,
    mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
    std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
)
"""What the released code does to test images: resize to 92x92, take the centre, scale to [0, 1], normalise."""

_KEYWORDS = {
    "N": "num_blocks",
    "head_metric": "num_heads",
    "head_enc": "patch_num_heads",
    "dp2": "support_dropout",
    "dp3": "query_dropout",
    "dp4": "patch_dropout",
    "lamda": "global_weight",
    "lamda1": "patch_mix",
    "lamda2": "query_residual",
    "temperature": "emd_temperature",
    "temperature2": "global_temperature",
}
_ENCODER_KEYWORDS = {"head": "num_heads", "dp1": "dropout_rate", "attn_axis": "attn_axis"}
_SOLVERS = {"opencv": "exact", "sinkhorn": "sinkhorn"}
# Official arguments that change scores, of which only the shipped value is implemented.
_SHIPPED = {
    "metric": "cosine",
    "norm": "center",
    "deepemd": "fcn",
    "feature_pyramid": None,
    "sfc_lr": 0.1,
    "sfc_wd": 0,
    "sfc_update_step": 100,
    "sfc_bs": 4,
}
# Official arguments that don't change the scores of a trained model.
_IGNORED = (
    "alpha bs data_dir extra_dir form gamma gpu l2_strength lr lrt max_epoch num_class num_patch patch_list "
    "patch_ratio pretrain_dir query random_val_task save_all save_path seed set shot step_size tau test_episode "
    "val_episode val_frequency way"
).split()


def from_torch(
    config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray], **overrides: Any
) -> tuple[QSFormer, dict[str, Any]]:
    """Model and variables of a meta-trained state dict.

    The model is the released one: attention over the batch in the encoder, prototypes fitted by SFC where there are
    several shots, L2 projections for FC100. `config["solver"]` "opencv" means the exact transport plan; where it is
    absent, Sinkhorn.

    Args:
      config: official arguments by name; `dataset`, and those that differ from the shipped command of that data set.
      state_dict: official names, perhaps with `module.`, to arrays.
      **overrides: keywords of `QSFormer` or of its `CIFE` encoder that replace those of the released model.
    """
    model = _model(config, overrides)
    state_dict = _official_names(state_dict)
    blocks = {name.split(".")[1] for name in state_dict if name.startswith("trans.")}
    if not blocks:
        raise UsageError(
            "The state dict holds an image encoder alone, no trans.* and no patchFormer.*: convert it with kind "
            "'qsformer-encoder', or give the state dict of a meta-trained model."
        )
    if len(blocks) != model.num_blocks:
        raise UsageError(
            f"config N is {model.num_blocks}, but the state dict has {len(blocks)} blocks (trans.*): set N to "
            f"{len(blocks)}, or give the state dict that belongs to the config."
        )
    return model, read(_tensors(model), state_dict, _unused(model))


def to_torch(config: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Official state dict, without `module.`, of the variables of a model that `from_torch` could have made."""
    model = _model(config, {})
    return write(_tensors(model), variables, _unused(model))


def encoder_from_torch(
    config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray], **overrides: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The image encoder alone, of a pre-trained or a meta-trained state dict; arguments as of `from_torch`."""
    encoder = _model(config, overrides).encoder
    state_dict = {
        name: value
        for name, value in _official_names(state_dict).items()
        if not name.startswith(("trans.", "patchFormer."))
    }
    return encoder, read(_encoder_tensors(encoder, ""), state_dict, _unused_of_encoder())


def encoder_to_torch(config: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Official state dict of an encoder, with `encoder.` before each name."""
    return write(_encoder_tensors(_model(config, {}).encoder, ""), variables, _unused_of_encoder())


def released_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of the released code that it never uses and that `model` leaves out: official name to size.

    With them, the parameters of the four `VARIANTS` count 46,484,480 (mini- and tieredImageNet), 52,805,888 (FC100) and
    40,163,072 (CUB), as published. Empty for a model that is not built on CIFE and ResNet-12.
    """
    if not isinstance(model, QSFormer) or not isinstance(model.encoder, CIFE):
        return {}
    if not isinstance(model.encoder.backbone, ResNet12):
        return {}
    return {name: math.prod(shape) for name, (shape, _) in _unused_of_blocks(model).items()}


def model_config(config: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """The config of the released model, as `xattn.models.build` takes it; arguments as of `from_torch`."""
    if "dataset" not in config:
        raise UsageError(f"config has no dataset: give one of {', '.join(VARIANTS)}.")
    keywords = lookup(VARIANTS, config["dataset"], "dataset") | dict(prototypes="sfc")
    encoder = keywords.pop("encoder") | dict(attn_axis="batch")
    for key, value in config.items():
        if key in _KEYWORDS:
            keywords[_KEYWORDS[key]] = value
        elif key in _ENCODER_KEYWORDS:
            encoder[_ENCODER_KEYWORDS[key]] = value
        elif key == "solver":
            keywords["solver"] = lookup(_SOLVERS, value, "solver")
        elif key in _SHIPPED:
            if value != _SHIPPED[key]:
                raise UsageError(f"config {key} is {value!r}: only {_SHIPPED[key]!r}, the shipped value, is supported.")
        elif key != "dataset" and key not in _IGNORED:
            known = dict.fromkeys(["dataset", "solver", *_KEYWORDS, *_ENCODER_KEYWORDS, *_SHIPPED, *_IGNORED])
            lookup(known, key, "official argument")
    for key, value in overrides.items():
        if key in ("attention", "dtype"):
            keywords[key] = encoder[key] = value
        else:
            of_encoder = key not in QSFormer.__dataclass_fields__ and key in CIFE.__dataclass_fields__
            (encoder if of_encoder else keywords)[key] = value
    if "encoder" in keywords:
        raise UsageError("overrides cannot replace the encoder whose weights are read: leave out 'encoder'.")
    check_keys(keywords, QSFormer, "overrides")
    return dict(name="qsformer", encoder=dict(name="cife", backbone=dict(name="resnet12"), **encoder), **keywords)


def _model(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    model: Any = build(model_config(config, **overrides), dtype=overrides.get("dtype"))
    width = model.encoder.backbone.widths[-1]
    heads = {"head": model.encoder.num_heads, "head_metric": model.num_heads, "head_enc": model.patch_num_heads}
    for key, count in heads.items():
        if width % count:
            raise UsageError(f"config {key} is {count}, which does not divide the width {width}: choose a divisor.")
    return model


def _attention(name: str, path: str, width: int, heads: int) -> dict[str, Tensor]:
    """The rows of the packed projection are those of q, k and v; within each, head by head."""
    parts = [f"params/{path}/{part}" for part in ("query", "key", "value")]
    per_head = (heads, width // heads)
    return {
        f"{name}.in_proj_weight": Tensor(
            (3 * width, width),
            tuple(f"{part}/kernel" for part in parts),
            lambda w: tuple(block.T.reshape(width, *per_head) for block in np.split(w, 3)),
            lambda *kernels: np.concatenate([kernel.reshape(width, width).T for kernel in kernels]),
        ),
        f"{name}.in_proj_bias": Tensor(
            (3 * width,),
            tuple(f"{part}/bias" for part in parts),
            lambda b: tuple(block.reshape(per_head) for block in np.split(b, 3)),
            lambda *biases: np.concatenate([bias.reshape(width) for bias in biases]),
        ),
        f"{name}.out_proj.weight": Tensor(
            (width, width),
            (f"params/{path}/out/kernel",),
            lambda w: (w.T.reshape(*per_head, width),),
            lambda kernel: kernel.reshape(width, width).T,
        ),
        f"{name}.out_proj.bias": vector(width, f"params/{path}/out/bias"),
    }


def _layer(name: str, path: str, width: int, heads: int, mlp_dim: int, *, memory: bool = False) -> dict[str, Tensor]:
    """An encoder layer of torch, or a decoder layer if it has a `memory`."""
    tensors = _attention(f"{name}.self_attn", f"{path}/self_attn", width, heads)
    if memory:
        tensors |= _attention(f"{name}.multihead_attn", f"{path}/cross_attn", width, heads)
    tensors |= linear(f"{name}.linear1", f"{path}/mlp/linear1", mlp_dim, width)
    tensors |= linear(f"{name}.linear2", f"{path}/mlp/linear2", width, mlp_dim)
    for i in range(1, 4 if memory else 3):
        tensors |= norm(f"{name}.norm{i}", f"{path}/norm{i}", width)
    return tensors


def _encoder_tensors(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    tensors = {}
    widths = (3, *encoder.backbone.widths)
    width = widths[-1]
    for s, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        name, path = f"encoder.layer{s + 1}.0", f"{prefix}backbone/stage_{s}"
        for i in range(3):
            tensors |= conv(f"{name}.conv{i + 1}", f"{path}/conv_{i}", inputs if i == 0 else outputs, outputs, 3)
            tensors |= batch_norm(f"{name}.bn{i + 1}", f"{path}/norm_{i}", outputs)
        tensors |= conv(f"{name}.downsample.0", f"{path}/conv_shortcut", inputs, outputs, 1)
        tensors |= batch_norm(f"{name}.downsample.1", f"{path}/norm_shortcut", outputs)
    layer = (width, encoder.num_heads, encoder.mlp_dim)
    tensors |= conv("encoder.conv_3", f"{prefix}conv_3", widths[-2], width, 4)
    tensors["encoder.conv_3.bias"] = vector(width, f"params/{prefix}conv_3/bias")
    tensors |= _layer("encoder.encoder_layer_3", f"{prefix}encoder_layer", *layer)
    tensors |= _layer("encoder.decoder_layer_3", f"{prefix}decoder_layer", *layer, memory=True)
    return tensors


def _tensors(model: QSFormer) -> dict[str, Tensor]:
    width = model.encoder.backbone.widths[-1]
    tensors = _encoder_tensors(model.encoder, "encoder/")
    for i in range(model.num_blocks):
        name, path = f"trans.{i}", f"block_{i}"
        tensors |= _layer(f"{name}.encoder_layer", f"{path}/encoder_layer", width, model.num_heads, model.mlp_dim)
        tensors |= _attention(f"{name}.sa", f"{path}/query_attn", width, model.num_heads)
        tensors |= linear(f"{name}.transformer_decoder.qkv", f"{path}/projection", width, width)
        if model.projection_norm == "layer":
            tensors |= norm(f"{name}.transformer_decoder.norm", f"{path}/norm", width)
    return tensors | _attention("patchFormer", "patchformer", width, model.patch_num_heads)


def _unused_of_encoder() -> dict[str, tuple[tuple[int, ...], np.generic]]:
    """Counters of BatchNorm, never read in evaluation: official name to (shape, initial value)."""
    norms = ("bn1", "bn2", "bn3", "downsample.1")
    return {f"encoder.layer{s}.0.{name}.num_batches_tracked": ((), np.int64(0)) for s in range(1, 5) for name in norms}


def _unused_of_blocks(model: QSFormer) -> dict[str, tuple[tuple[int, ...], np.generic]]:
    """LayerNorms that no forward pass applies: official name to (shape, initial value)."""
    norms = ("norm",) if model.projection_norm == "layer" else ("norm", "transformer_decoder.norm")
    shape = (model.encoder.backbone.widths[-1],)
    return {
        f"trans.{i}.{name}.{part}": (shape, np.float32(value))
        for i in range(model.num_blocks)
        for name in norms
        for part, value in (("weight", 1), ("bias", 0))
    }


def _unused(model: QSFormer) -> dict[str, tuple[tuple[int, ...], np.generic]]:
    return _unused_of_encoder() | _unused_of_blocks(model)


def _official_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names without `module.`, with `encoder.` where a file of the encoder alone lacks it, without the classifier."""
    names = {name: name.removeprefix("module.") for name in state_dict}
    if not any(name.startswith("encoder.") for name in names.values()):
        names = {name: name if short.startswith("fc.") else f"encoder.{short}" for name, short in names.items()}
    return {short: np.asarray(state_dict[name]) for name, short in names.items() if not short.startswith("fc.")}
