"""DeepMind's Perceiver IO weights (deepmind-research/perceiver, arXiv 2107.14795) to xattn and back.

The published pickles hold Haiku's parameters, module name to parameter name to array. Here they are flat, with the key
"module/parameter", such as `perceiver_encoder/~/cross_attention/layer_norm/scale`; the moving averages of BatchNorm,
Haiku's state, are among them. `docs/weights.md` has the lines that make such an npz of a pickle.

Arrays are laid out as ours, except that the heads of attention are one axis and that those of BatchNorm are
[1, 1, 1, C]. Of a moving average only `average` is read and written, not the `hidden` and `counter` that training
continues from.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from xattn.config import lookup
from xattn.interop.perceiver import merge, table
from xattn.interop.tensors import Rules, Tensor, read, write
from xattn.models import build
from xattn.models.perceiver_io import VARIANTS

# Published model: the names of its encoder and of the decoder that attends.
PARTS = {
    "language": ("perceiver_encoder", "basic_decoder"),
    "imagenet_learned": ("perceiver_encoder", "classification_decoder/~/basic_decoder"),
    "imagenet_fourier": ("perceiver_encoder", "classification_decoder/~/basic_decoder"),
    "imagenet_conv": ("perceiver_encoder", "classification_decoder/~/basic_decoder"),
    "optical_flow": ("perceiver_encoder", "flow_decoder/~/basic_decoder"),
    "multimodal": ("encoder", "multimodal_decoder/~/basic_decoder"),
}
_POSTPROCESSORS = {"audio": "audio", "image": "projection", "label": "classification"}


def from_haiku(name: str, arrays: Mapping[str, np.ndarray], **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Model and variables of DeepMind's arrays; the model computes what the released code does.

    Args:
      name: the published model, one of `PARTS`.
      arrays: "module/parameter" to arrays.
      **overrides: keywords of `PerceiverIO` that replace those of the model, such as variant="hf" or
        encoder=dict(remat=True).
    """
    config = model_config(name, **overrides)
    kept = {key: x for key, x in arrays.items() if not key.endswith(("_ema/hidden", "_ema/counter"))}
    return build(config), read(_tensors(name, config), kept)


def to_haiku(name: str, variables: Mapping[str, Any], **overrides: Any) -> dict[str, np.ndarray]:
    """DeepMind's arrays of the variables of a model that `from_haiku` could have made with the same overrides."""
    return write(_tensors(name, model_config(name, **overrides)), variables)


def model_config(name: str, **overrides: Any) -> dict[str, Any]:
    """The config of the model for `xattn.models.build`; arguments as of `from_haiku`."""
    lookup(PARTS, name, "published Perceiver")
    return merge(VARIANTS[name] | dict(variant="deepmind"), overrides)


def _tensors(name: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = table(config, _rules(name), torch=False)
    for key, tensor in tensors.items():
        if "/batchnorm/" in key:
            shape = (1, 1, 1, *tensor.shape)
            tensors[key] = tensor._replace(shape=shape, write=lambda x, shape=shape: x.reshape(shape))
    return tensors


def _rules(name: str) -> Rules:
    encoder, decoder = PARTS[name]
    stem, image = "image_preprocessor/~/conv2_d_downsample/~", "image_preprocessor/~_build_network_inputs"
    positions = "" if name == "language" else f"{image}/"
    return [
        (r"^encoder/latents", f"{encoder}/~/trainable_position_encoding/pos_embs"),
        (r"^encoder/cross_attend", f"{encoder}/~/cross_attention"),
        (r"^encoder/self_attend_0/", f"{encoder}/~/self_attention/"),
        (r"^encoder/self_attend_", f"{encoder}/~/self_attention_"),
        (r"^decoder/cross_attend", f"{decoder}/cross_attention"),
        (r"^decoder/output", f"{decoder}/output"),
        (r"^decoder/query_embs", f"{decoder}/~/trainable_position_encoding/pos_embs"),
        (r"^decoder/label_query_embs", "classification_decoder/~/basic_decoder/~/trainable_position_encoding/pos_embs"),
        (r"^decoder/(\w+_padding)", r"multimodal_decoder/~decoder_query/\1/pos_embs"),
        (r"^input_preprocessor/(\w+_(padding|mask_token))", r"multimodal_preprocessor/\1/pos_embs"),
        (r"^input_preprocessor/token_embed/embedding", "embed/embeddings"),
        (r"^input_preprocessor/pos_embs", f"{positions}trainable_position_encoding/pos_embs"),
        (r"^input_preprocessor/pos_proj", f"{image}/position_encoding_projector/linear"),
        (r"^input_preprocessor/conv1x1", "image_preprocessor/~/conv2_d"),
        (r"^input_preprocessor/conv/", f"{stem}/conv/"),
        (r"^input_preprocessor/bn/(mean|var)", rf"{stem}/batchnorm/~/\1_ema/average"),
        (r"^input_preprocessor/bn", f"{stem}/batchnorm"),
        (r"^input_preprocessor/patch_linear", "image_preprocessor/patches_linear"),
        (r"^output_postprocessor/(\w+)", lambda found: f"{_POSTPROCESSORS[found[1]]}_postprocessor/linear"),
        (r"norm/bias$", "norm/offset"),
        (r"/(q_)?norm/", "/layer_norm/"),
        (r"/kv_norm/", "/layer_norm_1/"),
        (r"/cross_attention/mlp_norm/", "/cross_attention/layer_norm_2/"),
        (r"/mlp_norm/", "/layer_norm_1/"),
        (r"/attention/query/", "/attention/linear/"),
        (r"/attention/key/", "/attention/linear_1/"),
        (r"/attention/value/", "/attention/linear_2/"),
        (r"/attention/out/", "/attention/linear_3/"),
        (r"/mlp/dense1/", "/mlp/linear/"),
        (r"/mlp/dense2/", "/mlp/linear_1/"),
        (r"/kernel$", "/w"),
        (r"(?<!embedding_decoder)/bias$", "/b"),
    ]
