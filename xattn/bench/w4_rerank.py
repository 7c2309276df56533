"""W4: scoring 100 images for one text with a transformer of 6 pre-norm layers of 384, 6 heads, MLP of 4 x 384.

    joint        text and image, 32 + 196 tokens, in one sequence
    cross-only   32 text tokens that ask the image's 196, whose keys and values of each layer were made before

Ours and the peers run the same weights: joint agrees with joint, and cross-only with cross-only. On CPUs ours score a
few candidates at a time, so that what a layer makes of them stays in the cache; the others score all at once, which is
no slower for torch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from xattn.bench import Request, peers
from xattn.bench.measure import Case, Program, Row, Work, jitted, rounded
from xattn.layers.cross_attention import CrossAttention
from xattn.layers.transformer import layer_norm
from xattn.layers.vit import Block, Mlp

AT_A_TIME = {"joint": 5, "cross-only": 25}
"""Candidates that are scored together on a CPU, or the largest common divisor with all: 1140 and 800 tokens, of 1536
channels in the MLP."""


class Joint(nn.Module):
    """Self-attention and MLP over all tokens [B, N, C]."""

    num_heads: int
    num_layers: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        for i in range(self.num_layers):
            x = Block(self.num_heads, dtype=self.dtype, name=f"layer_{i}")(x)
        return x


class CrossOnly(nn.Module):
    """Text x [B, N, C]: self-attention, attention over an image, MLP, each after LayerNorm and added to x."""

    num_heads: int
    num_layers: int
    width: int
    dtype: Any = None

    def setup(self) -> None:
        def attentions() -> list[CrossAttention]:
            return [
                CrossAttention(self.num_heads, qk_features=self.width, dtype=self.dtype) for _ in range(self.num_layers)
            ]

        self.own, self.cross = attentions(), attentions()
        self.mlp = [Mlp(4.0, dtype=self.dtype) for _ in range(self.num_layers)]
        self.norm = [layer_norm(dtype=self.dtype) for _ in range(3 * self.num_layers)]

    def project_kv(self, image: Float[Array, "B M C"]) -> list[tuple[Array, Array]]:
        """Keys and values [B, M, H, D] of every layer."""
        return [cross.project_kv(image) for cross in self.cross]

    def __call__(self, x: Float[Array, "B N C"], kvs: Any) -> Float[Array, "B N C"]:
        for i, kv in enumerate(kvs):
            x = x + self.own[i](self.norm[3 * i](x))
            x = x + self.cross[i](self.norm[3 * i + 1](x), kv=kv)
            x = x + self.mlp[i](self.norm[3 * i + 2](x), deterministic=True)
        return x

    def score(self, x: Float[Array, "B N C"], image: Float[Array, "B M C"]) -> Float[Array, "B N C"]:
        """The output without a cache."""
        return self(x, self.project_kv(image))


def cases(
    request: Request,
    candidates: int = 100,
    text: int = 32,
    image: int = 196,
    width: int = 384,
    num_heads: int = 6,
    num_layers: int = 6,
) -> list[Case]:
    """The block."""
    dtype = request.dtype
    array = peers.array_of(dtype)
    tokens = peers.normal(candidates, text + image, width)
    words, pictures = tokens[:, :text], tokens[:, text:]
    joint, cross = Joint(num_heads, num_layers), CrossOnly(num_heads, num_layers, width)
    joint_params = peers.variables(joint, tokens[:1])["params"]
    cross_params = peers.variables(cross, words[:1], pictures[:1], method="score")["params"]

    def attend(lib: Any, p: Any, x: Any, kv: Any = None) -> Any:
        return peers.attention(lib, p, x, kv or peers.keys_values(lib, p, x, num_heads), num_heads)

    def joint_layers(lib: Any, p: Any, x: Any) -> Any:
        for i in range(num_layers):
            layer = p[f"layer_{i}"]
            x = x + attend(lib, layer["attn"], lib.layer_norm(x, layer["norm1"], 1e-6))
            x = x + peers.mlp(lib, layer["mlp"], lib.layer_norm(x, layer["norm2"], 1e-6), ("fc1", "fc2"), False)
        return x

    def cross_layers(lib: Any, p: Any, x: Any, kvs: Any) -> Any:
        def normed(i: int, x: Any) -> Any:
            return lib.layer_norm(x, p[f"norm_{i}"], 1e-5)

        for i, kv in enumerate(kvs):
            x = x + attend(lib, p[f"own_{i}"], normed(3 * i, x))
            x = x + attend(lib, p[f"cross_{i}"], normed(3 * i + 1, x), kv)
            x = x + peers.mlp(lib, p[f"mlp_{i}"], normed(3 * i + 2, x), ("fc1", "fc2"), False)
        return x

    def cache(lib: Any, p: Any) -> list[tuple[Any, Any]]:
        return [peers.keys_values(lib, p[f"cross_{i}"], lib.array(pictures), num_heads) for i in range(num_layers)]

    def at_a_time(way: str, score: Callable[..., Any]) -> Callable[..., Any]:
        count = candidates if request.mode == "device" else math.gcd(candidates, AT_A_TIME[way])

        def run(p: Any, *xs: Any) -> Any:
            if count == candidates:
                return score(p, *xs)
            parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), xs)
            return jax.lax.map(lambda xs: score(p, *xs), parts).reshape(xs[0].shape)

        return run

    ours_joint = at_a_time("joint", lambda p, x: joint.apply({"params": p}, x))

    def program(function: Any) -> Any:
        return lambda: jitted(function, jax.tree.map(array, joint_params), array(tokens))

    def ours_cross() -> Program:
        params = jax.tree.map(array, cross_params)
        kvs = jax.jit(lambda p, x: cross.apply({"params": p}, x, method="project_kv"))(params, array(pictures))
        score = at_a_time("cross-only", lambda p, x, kvs: cross.apply({"params": p}, x, kvs))
        return jitted(score, params, array(words), kvs)

    def their_joint(lib: Any) -> Program:
        return lib.program(lambda p, x: joint_layers(lib, p, x), lib.params(joint_params), lib.array(tokens))

    def their_cross(lib: Any) -> Program:
        p = lib.params(cross_params)
        return lib.program(lambda p, x, kvs: cross_layers(lib, p, x, kvs), p, lib.array(words), cache(lib, p))

    n, m, c, layers = text + image, image, width, candidates * num_layers
    itemsize = 2 if dtype == "bf16" else 4
    joint_work = Work(
        layers * (24 * n * c**2 + 4 * n**2 * c),
        layers * num_heads * n**2,
        itemsize * (2 * tokens.size + num_layers * 12 * c**2),
    )
    cross_work = Work(
        layers * (28 * text * c**2 + 4 * text * (text + m) * c),
        layers * num_heads * text * (text + m),
        itemsize * (2 * layers * m * c + 2 * words.size + num_layers * 14 * c**2),
    )
    # Errors add up over the layers, in every library.
    of_joint: dict[str, Any] = {"group": "joint", "tolerance": 1e-4}
    of_cross: dict[str, Any] = {"group": "cross-only", "work": cross_work, "tolerance": 1e-4}
    bf16: dict[str, Any] = of_joint | {"tolerance": 0.05, "dtype": "bf16"}
    rows = [
        Row("xattn joint", "ours", program(ours_joint), **of_joint),
        Row("xattn joint bf16", "ours", program(rounded(ours_joint)), **bf16),
        Row("xattn cross-only", "ours", ours_cross, **of_cross),
        Row("plain jnp joint", "reference", lambda: their_joint(peers.jnp_library(dtype)), **of_joint),
        Row("plain jnp cross-only", "reference", lambda: their_cross(peers.jnp_library(dtype)), **of_cross),
        Row("torch joint", "peer", lambda: their_joint(peers.torch_library(dtype)), package="torch", **of_joint),
        Row("torch cross-only", "peer", lambda: their_cross(peers.torch_library(dtype)), package="torch", **of_cross),
    ]
    shape = f"{candidates} candidates, {text}+{image} tokens, {num_layers} layers of {width}"
    return [Case("rerank", shape, rows, ("torch joint", "plain jnp joint"), joint_work)]
