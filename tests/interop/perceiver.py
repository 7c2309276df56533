"""Small Perceiver IO models of Hugging Face: their configs, weights that a seed fills, inputs, and outputs by torch.

Only `reference` and `shapes` need torch and transformers.
"""

import zlib
from typing import Any

import numpy as np

ARCHITECTURES = tuple(
    f"PerceiverFor{name}"
    for name in (
        "MaskedLM SequenceClassification ImageClassificationLearned ImageClassificationFourier "
        "ImageClassificationConvProcessing OpticalFlow MultimodalAutoencoding"
    ).split()
)
TEXT = ARCHITECTURES[:2]
FLOW, MULTIMODAL = ARCHITECTURES[-2:]


def config(architecture: str, seed: int | None = None) -> dict[str, Any]:
    """What a small config.json would hold; with a seed, sizes and options are drawn."""
    rng = np.random.default_rng(seed)

    def draw(default, *others):
        return default if seed is None else (default, *others)[rng.integers(1 + len(others))]

    made = dict(
        architectures=[architecture],
        num_latents=draw(8, 5, 12),
        d_latents=draw(32, 48),
        num_blocks=draw(2, 1, 3),
        num_self_attends_per_block=draw(2, 1, 3),
        num_self_attention_heads=draw(8, 2, 4),
        num_cross_attention_heads=1,
        self_attention_widening_factor=draw(1, 2),
        cross_attention_widening_factor=draw(1, 2),
        cross_attention_shape_for_attention=draw("kv", "q"),
        use_query_residual=draw(True, False),
        id2label={str(i): f"LABEL_{i}" for i in range(draw(10, 3))},
    )
    if architecture in TEXT:
        width = made["d_latents"]
        made |= dict(num_cross_attention_heads=draw(8, 2), qk_channels=draw(64, 16), v_channels=width)
        made |= dict(d_model=draw(24, 40), max_position_embeddings=draw(12, 18), vocab_size=draw(262, 270))
    elif "Image" in architecture:
        made |= dict(d_model={"L": 512, "F": 261, "C": 322}[architecture.removeprefix(ARCHITECTURES[2][:-7])[0]])
        made |= dict(image_size=draw(36, 37) if "Conv" in architecture else draw(6, 9))
    elif architecture == FLOW:
        made |= dict(d_model=322, train_size=draw([8, 12], [6, 4]))
    else:
        frames, side, patch = draw(4, 2), draw(4, 3), draw(16, 8)
        made |= dict(num_frames=frames, image_size=side, audio_samples_per_frame=2 * patch, samples_per_patch=patch)
        made |= dict(output_shape=[1, frames, 4 * side, 4 * side], output_num_channels=draw(24, 30))
        made |= {"_label_trainable_num_channels": draw(400, 420)}
    return made


def inputs(made: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of our model: two examples, floats standard normal; texts end in padding."""
    rng = np.random.default_rng([seed, 1])
    architecture = made["architectures"][0]

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    if architecture in TEXT:
        length = made["max_position_embeddings"]
        tokens = rng.integers(6, 262, (2, length)).astype(np.int32)
        mask = np.arange(length) < np.array([[length - 2], [length - 5]])
        return dict(inputs=np.where(mask, tokens, 0), input_mask=mask)
    if "Image" in architecture:
        return dict(inputs=normal(2, made["image_size"], made["image_size"], 3))
    if architecture == FLOW:
        return dict(inputs=normal(2, 2, *made["train_size"], 27))
    frames, height, width = made["output_shape"][1:]
    samples = made["num_frames"] * made["audio_samples_per_frame"]
    classes = len(made["id2label"])
    pixels = rng.choice(frames * height * width, 50, replace=False).astype(np.int32)
    patches = rng.choice(samples // made["samples_per_patch"], 3, replace=False).astype(np.int32)
    return dict(
        inputs=dict(
            image=normal(2, frames, height, width, 3),
            audio=normal(2, samples, 1),
            label=np.eye(classes, dtype=np.float32)[[0, 2]],
        ),
        subsampled_points=dict(image=pixels, audio=patches, label=None),
    )


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights by name: normal with deviation 0.08, about 1 for the scale of a norm; no mean, variance or bias is 0."""

    def values(name, shape):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            return np.zeros(shape, np.int64)
        if name.endswith("running_var"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return (("norm" in name and name.endswith("weight")) + rng.normal(0, 0.08, shape)).astype(np.float32)

    return {name: values(name, tuple(shape)) for name, shape in shapes.items()}


def build(made: dict[str, Any], **changes: Any):
    """Hugging Face's model of a config."""
    from transformers import PerceiverConfig
    from transformers.models.perceiver import modeling_perceiver

    kind = getattr(modeling_perceiver, made["architectures"][0])
    return kind(PerceiverConfig(**made | changes)).eval()


def shapes(made: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Hugging Face's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in build(made).state_dict().items()}


def reference(made: dict[str, Any], state: dict[str, np.ndarray], given: dict[str, Any], variant: str) -> Any:
    """What Hugging Face's model gives; for variant "deepmind", once it is corrected to what DeepMind trained."""
    import torch

    changes = {"hidden_act": "gelu_pytorch_tanh"} if variant == "deepmind" else {}
    model = build(made, **changes)
    model.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    if variant == "deepmind":
        _correct(model, given)
    with torch.no_grad():
        logits = model(**_keywords(made["architectures"][0], given)).logits
    if isinstance(logits, dict):
        return {name: x.numpy() for name, x in logits.items()}
    return logits.numpy()


def _keywords(architecture, given):
    """Our arguments in Hugging Face's layout: channels first."""
    import torch

    x = given["inputs"]
    if architecture in TEXT:
        return dict(inputs=torch.tensor(x).long(), attention_mask=torch.tensor(given["input_mask"]).long())
    if architecture == MULTIMODAL:
        points = {m: p if p is None else torch.tensor(p).long() for m, p in given["subsampled_points"].items()}
        x = x | {"image": np.moveaxis(x["image"], -1, 2)}
        return dict(inputs={m: torch.tensor(v) for m, v in x.items()}, subsampled_output_points=points)
    return dict(inputs=torch.tensor(np.moveaxis(x, -1, -3)))


def _correct(model, given):
    """The decoder of learned positions without its residual, the convolution's padding, the mask of queries."""
    import torch
    from torch.nn import functional as F

    name = type(model).__name__
    decoder = model.perceiver.decoder
    if name.endswith("Learned"):
        decoder.decoder.decoding_cross_attention.attention.use_query_residual = False
    if name.endswith("ConvProcessing"):
        stem = model.perceiver.input_preprocessor.convnet

        def same(x, size, value=0.0):
            total = [max((-(-n // 2) - 1) * 2 + size - n, 0) for n in (x.shape[-1], x.shape[-2])]
            return F.pad(x, [side for t in total for side in (t // 2, t - t // 2)], value=value)

        def forward(x):
            x = F.conv2d(same(x, 7), stem.conv.weight, stride=2)
            return F.max_pool2d(same(F.relu(stem.batchnorm(x)), 3, -torch.inf), 3, 2)

        stem.forward = forward
    if "query_mask" in given:
        kept = torch.tensor(given["query_mask"])[..., None]
        decoder.decoding_cross_attention.attention.self.register_forward_hook(
            lambda module, args, out: (out[0] * kept, *out[1:])
        )
