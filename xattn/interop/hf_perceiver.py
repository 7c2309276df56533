"""Perceiver IO of transformers (Hugging Face, `deepmind/*perceiver*`) to xattn and back.

The class is `config["architectures"][0]`, or what the names of the state dict tell. Sizes come from the config; what
the classes hard-code (bands, the heads of the text decoder, which decoders have a residual) is here.

Deviations: attention dropout (`attention_probs_dropout_prob`) is not taken over; the weights were trained without.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from xattn.config import UsageError, lookup
from xattn.interop.perceiver import merge, table
from xattn.interop.tensors import Rules, read, rename, write
from xattn.models import build
from xattn.models.perceiver_io import VARIANTS

LEARNED = "PerceiverForImageClassificationLearned"
VARIANT_OF = {
    "PerceiverForMaskedLM": "language",
    "PerceiverForSequenceClassification": "language",
    LEARNED: "imagenet_learned",
    "PerceiverForImageClassificationFourier": "imagenet_fourier",
    "PerceiverForImageClassificationConvProcessing": "imagenet_conv",
    "PerceiverForOpticalFlow": "optical_flow",
    "PerceiverForMultimodalAutoencoding": "multimodal",
}
"""Classes of transformers: the entry of `xattn.models.perceiver_io.VARIANTS` that has their parts."""

# A leaf that tells the class, where the config doesn't.
_TELLING = {
    "embedding_decoder/bias": "PerceiverForMaskedLM",
    "input_preprocessor/token_embed/embedding": "PerceiverForSequenceClassification",
    "input_preprocessor/conv1x1/kernel": LEARNED,
    "input_preprocessor/conv/kernel": "PerceiverForImageClassificationConvProcessing",
    "input_preprocessor/patch_linear/kernel": "PerceiverForOpticalFlow",
    "input_preprocessor/audio_padding": "PerceiverForMultimodalAutoencoding",
    "encoder/latents": "PerceiverForImageClassificationFourier",
}

_ENCODER = {
    "num_latents": ("num_latents", 256),
    "latent_features": ("d_latents", 1280),
    "num_blocks": ("num_blocks", 1),
    "num_self_attends_per_block": ("num_self_attends_per_block", 26),
    "num_cross_heads": ("num_cross_attention_heads", 8),
    "num_self_heads": ("num_self_attention_heads", 8),
    "qk_features": ("qk_channels", None),
    "v_features": ("v_channels", None),
    "attention_shape": ("cross_attention_shape_for_attention", "kv"),
    "cross_widening_factor": ("cross_attention_widening_factor", 1),
    "self_widening_factor": ("self_attention_widening_factor", 1),
    "use_query_residual": ("use_query_residual", True),
}
"""Keyword of our encoder: key of the config, and its value where it is left out."""


def from_torch(
    config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray], **overrides: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Model and variables of a state dict; the model computes what transformers does.

    Args:
      config: the contents of config.json.
      state_dict: transformers' names to arrays.
      **overrides: keywords of `PerceiverIO` that replace those of the model, such as variant="deepmind" (what the
        weights were trained with) or encoder=dict(remat=True).
    """
    name = architecture(config, state_dict)
    made = model_config({**config, "architectures": [name]}, **overrides)
    # How many batches BatchNorm has seen matters to nothing.
    arrays = {key: x for key, x in state_dict.items() if not key.endswith("num_batches_tracked")}
    return build(made), read(table(made, rules(name), torch=True), arrays)


def to_torch(config: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of the variables of a model that `from_torch` could have made; counters of batches are zero."""
    leaves = flatten_dict(variables["params"], sep="/")
    name = _architecture(config, lambda path, _: path in leaves)
    made = model_config({**config, "architectures": [name]})
    state_dict = write(table(made, rules(name), torch=True), variables)
    for key in [key for key in state_dict if key.endswith("running_mean")]:
        state_dict[key.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    return state_dict


def model_config(config: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """The config of the model for `xattn.models.build`; arguments as of `from_torch`, `architectures` is needed.

    Raises:
      UsageError: another class, an activation that is not implemented.
    """
    name = architecture(config, {})
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise UsageError(f"config hidden_act is '{activation}': only 'gelu' is supported.")
    variant = overrides.get("variant", "hf")
    parts = VARIANTS[VARIANT_OF[name]]
    encoder = {ours: config.get(theirs, default) for ours, (theirs, default) in _ENCODER.items()}
    latents, labels = encoder["latent_features"], len(config.get("id2label") or range(config.get("num_labels", 2)))
    changes: dict[str, Any] = dict(variant=variant, encoder=encoder)
    decoder: dict[str, Any] = {}
    query_width = latents

    if name.endswith(("MaskedLM", "SequenceClassification")):
        width, length = config.get("d_model", 768), config.get("max_position_embeddings", 2048)
        vocabulary = config.get("vocab_size", 262)
        changes["input_preprocessor"] = dict(vocab_size=vocabulary, max_positions=length, features=width)
        decoder = dict(v_features=width, queries=dict(index_dims=(length,), positions=dict(features=width)))
        if name.endswith("SequenceClassification"):
            parts = {key: value for key, value in parts.items() if key != "embedding_decoder"}
            parts |= {"decoder": VARIANTS["imagenet_fourier"]["decoder"]}
    if "Classification" in name:
        residual = name != LEARNED or variant == "hf"
        query = dict(positions=dict(features=latents))
        decoder = dict(queries=query, output_features=labels, use_query_residual=residual)
    if name == LEARNED:
        side = config.get("image_size", 56)
        changes["input_preprocessor"] = dict(positions=dict(index_dims=(side, side)))
    if name == "PerceiverForOpticalFlow":
        size = tuple(config.get("train_size", (368, 496)))
        changes["input_preprocessor"] = dict(positions=dict(max_resolution=size))
        decoder = dict(qk_features=latents, v_features=latents)
        query_width = 64 + 258
    if name == "PerceiverForMultimodalAutoencoding":
        label_width = config.get("_label_trainable_num_channels", 1024)
        frames, side = config.get("num_frames", 16), config.get("image_size", 56)
        samples, patch = frames * config.get("audio_samples_per_frame", 1920), config.get("samples_per_patch", 16)
        video = tuple(config.get("output_shape", (1, 16, 224, 224)))[1:]
        image, audio = dict(max_resolution=(frames, side, side)), dict(max_resolution=(samples,))
        inputs = dict(audio=dict(samples_per_patch=patch, positions=audio), image=dict(positions=image))
        outputs = dict(audio=dict(samples_per_patch=patch), label=dict(features=labels))
        changes |= dict(input_preprocessor=dict(modalities=inputs), output_postprocessor=dict(modalities=outputs))
        queries = dict(
            audio=dict(index_dims=(samples // patch,), positions=audio),
            image=dict(index_dims=video, positions=image),
            label=dict(positions=dict(features=label_width)),
        )
        decoder = dict(queries=queries, output_features=config.get("output_num_channels", 512))
        query_width = max(label_width, 385) + 2
    if encoder["attention_shape"] == "q" and name != "PerceiverForMaskedLM":
        decoder |= dict(qk_features=query_width, v_features=query_width)
    return merge(merge(parts, changes | dict(decoder=decoder)), overrides)


def architecture(config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray]) -> str:
    """The class that a config names, or else the names of the state dict tell."""
    return _architecture(config, lambda path, name: rename(path, rules(name)) in state_dict)


def _architecture(config: Mapping[str, Any], has: Callable[[str, str], bool]) -> str:
    if names := config.get("architectures"):
        lookup(VARIANT_OF, names[0], "Perceiver class")
        return names[0]
    for path, name in _TELLING.items():
        if has(path, name):
            return name
    raise UsageError(f"config has no architectures: give one of {', '.join(VARIANT_OF)}.")


def rules(name: str) -> Rules:
    """How paths of leaves become the names in a class of transformers."""
    decoder = "perceiver/decoder" if name == "PerceiverForMaskedLM" else "perceiver/decoder/decoder"
    positions = "position_embeddings" if name == LEARNED else "weight"
    label = "perceiver/decoder/modalities/label/decoder"
    return [
        (r"^encoder/latents", "perceiver/embeddings/latents"),
        (r"^encoder/cross_attend", "perceiver/encoder/cross_attention"),
        (r"^encoder/self_attend_", "perceiver/encoder/self_attends/"),
        (r"^decoder/cross_attend", f"{decoder}/decoding_cross_attention"),
        (r"^decoder/output", f"{decoder}/final_layer"),
        (r"^decoder/query_embs", f"{decoder}/output_position_encodings/position_embeddings"),
        (r"^decoder/label_query_embs", f"{label}/output_position_encodings/position_embeddings"),
        (r"^decoder/(\w+)_padding", r"perceiver/decoder/padding/\1"),
        (r"^input_preprocessor", "perceiver/input_preprocessor"),
        (r"input_preprocessor/(\w+)_padding", r"input_preprocessor/padding/\1"),
        (r"input_preprocessor/(\w+)_mask_token", r"input_preprocessor/mask/\1"),
        (r"input_preprocessor/token_embed", "input_preprocessor/embeddings"),
        (r"input_preprocessor/pos_embs", f"input_preprocessor/position_embeddings/{positions}"),
        (r"input_preprocessor/pos_proj", "input_preprocessor/positions_projection"),
        (r"input_preprocessor/conv1x1", "input_preprocessor/convnet_1x1"),
        (r"input_preprocessor/conv/", "input_preprocessor/convnet/conv/"),
        (r"input_preprocessor/bn", "input_preprocessor/convnet/batchnorm"),
        (r"input_preprocessor/patch_linear", "input_preprocessor/conv_after_patches"),
        (r"^output_postprocessor/(\w+)", r"perceiver/output_postprocessor/modalities/\1/classifier"),
        (r"/(q_)?norm/", "/attention/self/layernorm1/"),
        (r"/kv_norm/", "/attention/self/layernorm2/"),
        (r"/attention/(query|key|value)/", r"/attention/self/\1/"),
        (r"/attention/out/", "/attention/output/dense/"),
        (r"/mlp_norm/", "/layernorm/"),
        (r"/(kernel|scale|embedding)$", "/weight"),
        (r"/(mean|var)$", r"/running_\1"),
        (r"/", "."),
    ]
