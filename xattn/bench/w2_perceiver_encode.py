"""W2: the cross-attend of Perceiver IO (arXiv 2107.14795) that reads an image, and the whole model that starts with it.

512 latents [512, 1024] read the 50176 pixels of a 224 x 224 image, [50176, 261] with their Fourier features, with one
head of 261: LayerNorm on both sides, attention, residual, MLP. The whole model is the published classifier with Fourier
features, run as transformers runs it.
"""

import importlib
from typing import Any

import jax
import numpy as np

from xattn import interop
from xattn.bench import Request, peers
from xattn.bench.measure import Case, Program, Row, Work, jitted
from xattn.interop import hf_perceiver
from xattn.layers.perceiver import CrossAttend
from xattn.models import build

_CLASS = "PerceiverForImageClassificationFourier"


def cases(
    request: Request,
    batch: int = 1,
    latents: int = 512,
    width: int = 1024,
    pixels: int = 50176,
    channels: int = 261,
    image: dict[str, Any] | None = None,
) -> list[Case]:
    """The blocks; `image` are keys of the whole model's config, in transformers' names, that replace its sizes."""
    dtype = request.dtype
    array = peers.array_of(dtype)
    z, x = peers.normal(batch, latents, width), peers.normal(batch, pixels, channels, seed=1)
    model = CrossAttend(num_heads=1)
    params = peers.variables(model, z, x[:, :1])["params"]

    def layer(lib: Any, p: Any, z: Any, x: Any) -> Any:
        asks = lib.layer_norm(z, p["q_norm"], 1e-5)
        reads = lib.layer_norm(x, p["kv_norm"], 1e-5)
        kv = peers.keys_values(lib, p["attention"], reads, num_heads=1)
        z = z + peers.attention(lib, p["attention"], asks, kv, num_heads=1)
        mapped = peers.mlp(lib, p["mlp"], lib.layer_norm(z, p["mlp_norm"], 1e-5), ("dense1", "dense2"), True)
        return z + mapped

    def ours() -> Program:
        def apply(params: Any, z: Any, x: Any) -> Any:
            return model.apply({"params": params}, z, x)

        return jitted(apply, jax.tree.map(array, params), array(z), array(x))

    def theirs(lib: Any) -> Program:
        return lib.program(lambda *arguments: layer(lib, *arguments), lib.params(params), lib.array(z), lib.array(x))

    # With one head of the inputs' width, W_k joins the queries and W_v the output: the pixels need no projection.
    absorbed = 2 * batch * latents * (2 * width * channels + 2 * channels**2 + 2 * width**2)
    scores = batch * latents * pixels
    itemsize = 2 if dtype == "bf16" else 4
    work = Work(
        absorbed + 4 * scores * channels,
        scores,
        itemsize * (batch * pixels * channels + 2 * batch * latents * width + 2 * width**2 + 2 * width * channels),
    )
    encode = Case(
        "encode",
        f"B{batch} {latents}x{width} <- {pixels}x{channels}",
        [
            Row("xattn", "ours", ours),
            *peers.rows(theirs, dtype),
        ],
        ("torch sdpa", "plain jnp"),
        work,
        memory=request.mode != "device",
    )
    return [encode] if request.suite == "quick" else [encode, _image(request, image or {})]


def _image(request: Request, sizes: dict[str, Any]) -> Case:
    config = {"num_latents": 512, "d_latents": 1024, "d_model": 261, "num_blocks": 8, "image_size": 224}
    config |= {"num_self_attends_per_block": 6, "num_self_attention_heads": 8, "num_cross_attention_heads": 1}
    config |= {"architectures": [_CLASS], "id2label": {str(i): str(i) for i in range(1000)}} | sizes
    side, dtype = config["image_size"], request.dtype
    array = peers.array_of(dtype)
    pixels = peers.normal(1, side, side, 3)
    model = build(hf_perceiver.model_config(config) | ({"dtype": "bfloat16"} if dtype == "bf16" else {}))
    variables = peers.variables(model, pixels)

    def ours() -> Program:
        return jitted(model.apply, jax.tree.map(array, variables), jax.numpy.asarray(pixels))

    def transformers() -> Program:
        tensor = peers.tensor_of(dtype)
        package = importlib.import_module("transformers")
        module = getattr(package, _CLASS)(package.PerceiverConfig(**config)).eval()
        module = peers.load(module, interop.to_torch("hf_perceiver", config, variables), dtype)
        images = tensor(np.moveaxis(pixels, -1, 1))
        return peers.torch_program(lambda: module(images).logits)

    n, d, m, c = config["num_latents"], config["d_latents"], side * side, config["d_model"]
    layers = config["num_blocks"] * config["num_self_attends_per_block"]
    cross = 2 * n * (2 * d * c + 2 * c**2 + 2 * d**2) + 4 * n * m * c
    flops = cross + layers * (2 * n * 6 * d**2 + 4 * n**2 * d) + 2 * (2 * n * d**2)
    exps = n * m + layers * config["num_self_attention_heads"] * n**2
    size = sum(x.size for x in jax.tree.leaves(variables))
    return Case(
        "image",
        f"1 image {side}x{side}, {size / 1e6:.1f} M parameters",
        [
            Row("xattn", "ours", ours, tolerance=1e-4),
            Row("transformers", "peer", transformers, package="hf", tolerance=1e-4),
        ],
        ("transformers", "xattn"),
        Work(flops, exps, 4 * (size + m * c)),
    )
