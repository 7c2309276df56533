"""W1: cross-attention of an image over a text, with the sizes of Stable Diffusion (arXiv 2112.10752).

Queries [B, 4096, 320] ask 77 words [B, 77, 768] with 8 heads of 40; only the output has a bias. Blocks: the whole
layer, the layer with cached keys and values, attention alone, and the gradients of the whole layer.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xattn.bench import Request, peers
from xattn.bench.measure import Case, Program, Row, Work, jitted, rounded
from xattn.layers.cross_attention import CrossAttention
from xattn.ops.attention import dot_product_attention


def cases(
    request: Request,
    batch: int | None = None,
    queries: int = 4096,
    width: int = 320,
    keys: int = 77,
    context: int = 768,
    num_heads: int = 8,
    long: tuple[int, int, int, int] = (4, 16, 8192, 64),
) -> list[Case]:
    """The blocks; `long` is [B, H, N = M, D] of one more on an accelerator, where B of the others is 64."""
    device, dtype = request.mode == "device", request.dtype
    batch, itemsize = batch or (64 if device else 2), 2 if dtype == "bf16" else 4
    array = peers.array_of(dtype)
    x, towards = (peers.normal(batch, queries, width, seed=seed) for seed in (0, 1))
    text = peers.normal(batch, keys, context, seed=2)
    model = CrossAttention(num_heads, qk_features=width, use_bias=False, out_bias=True)
    params = peers.variables(model, x, text)["params"]
    arguments = (jax.tree.map(array, params), array(x), array(text))

    def ours(params: Any, x: Any, text: Any) -> Any:
        return model.apply({"params": params}, x, text)

    def flax(params: Any, x: Any, text: Any) -> Any:
        # Linen's module has all biases or none.
        zeros = jnp.zeros((num_heads, width // num_heads), x.dtype)
        full = {key: {"bias": zeros} | value for key, value in params.items()}
        return nn.MultiHeadDotProductAttention(num_heads, qkv_features=width).apply({"params": full}, x, text)

    def layer(lib: Any) -> tuple[Any, ...]:
        def function(params: Any, x: Any, text: Any) -> Any:
            return peers.attention(lib, params, x, peers.keys_values(lib, params, text, num_heads), num_heads)

        return function, lib.params(params), lib.array(x), lib.array(text)

    def torch_module() -> Program:
        lib = peers.torch_library(dtype)
        module = peers.torch_package().nn.MultiheadAttention(
            width, num_heads, kdim=context, vdim=context, batch_first=True
        )
        p = peers.flatten(params, np.asarray, transpose=True)
        state = {f"{name[0]}_proj_weight": p[name]["kernel"] for name in ("query", "key", "value")}
        state |= {f"out_proj.{end}": p["out"][name] for end, name in (("weight", "kernel"), ("bias", "bias"))}
        module = peers.load(module, state | {"in_proj_bias": np.zeros(3 * width)}, dtype)
        return lib.program(lambda x, text: module(x, text, text, need_weights=False)[0], lib.array(x), lib.array(text))

    def ours_cached() -> Program:
        params, x, text = arguments
        kv = model.apply({"params": params}, text, method="project_kv")
        return jitted(lambda params, x, kv: model.apply({"params": params}, x, kv=kv), params, x, kv)

    def cached(lib: Any) -> Program:
        p = lib.params(params)
        kv = peers.keys_values(lib, p, lib.array(text), num_heads)
        return lib.program(lambda p, x, kv: peers.attention(lib, p, x, kv, num_heads), p, lib.array(x), kv)

    def gradients(lib: Any) -> Program:
        function, *arguments = layer(lib)
        return lib.gradients(function, lib.array(towards), *arguments)

    attend, exps = 4 * batch * queries * keys * width, batch * num_heads * queries * keys
    projections, kv_projections = 4 * batch * queries * width**2, 4 * batch * keys * context * width
    tokens, cache = 2 * batch * queries * width, 2 * batch * keys * width
    moved = itemsize * (2 * width**2 + 2 * context * width + tokens + batch * keys * context)
    whole = Work(projections + kv_projections + attend, exps, moved)
    step = Work(projections + attend, exps, itemsize * (2 * width**2 + tokens + cache))
    backward = Work(3 * whole.flops, exps, 2 * moved)

    shape = f"B{batch} {queries}x{width} <- {keys}x{context}, {num_heads} heads of {width // num_heads}"
    baseline = ("torch sdpa", "plain jnp")
    forward_rows = [
        Row("xattn", "ours", lambda: jitted(ours, *arguments)),
        Row("xattn bf16", "ours", lambda: jitted(rounded(ours), *arguments), tolerance=1e-2, dtype="bf16"),
        *peers.rows(lambda lib: lib.program(*layer(lib)), dtype),
        Row("flax MHDPA", "reference", lambda: jitted(flax, *arguments)),
        Row("torch nn.MultiheadAttention", "peer", torch_module, package="torch"),
    ]
    cached_rows = [Row("xattn", "ours", ours_cached), *peers.rows(cached, dtype)]
    gradient_rows = [
        Row("xattn", "ours", lambda: peers.gradients(ours, array(towards), *arguments)),
        *peers.rows(gradients, dtype),
        Row("flax MHDPA", "reference", lambda: peers.gradients(flax, array(towards), *arguments)),
    ]
    blocks = [
        Case("forward", shape, forward_rows, baseline, whole),
        Case("cached K/V", shape, cached_rows, baseline, step),
        _core("core", request, batch, num_heads, queries, keys, width // num_heads),
        Case("gradients", shape, gradient_rows, baseline, backward, memory=not device),
    ]
    if device:
        b, h, n, d = long
        blocks.append(_core("long core", request, b, h, n, n, d))
    return blocks


def _core(title: str, request: Request, b: int, h: int, n: int, m: int, d: int) -> Case:
    """Attention alone: queries [B, N, H, D], keys and values [B, M, H, D]."""
    qkv = [peers.normal(b, length, h, d, seed=seed) for seed, length in enumerate((n, m, m))]

    def in_jax(attend: Callable[..., Any]) -> Callable[[], Program]:
        return lambda: jitted(attend, *map(peers.array_of(request.dtype), qkv))

    rows = [
        Row("xattn", "ours", in_jax(dot_product_attention)),
        *peers.rows(lambda lib: lib.program(lib.attend, *map(lib.array, qkv)), request.dtype),
    ]
    if request.mode == "device":
        rows.append(Row("cudnn", "reference", in_jax(_cudnn)))
    itemsize = 2 if request.dtype == "bf16" else 4
    work = Work(4 * b * h * n * m * d, b * h * n * m, itemsize * 2 * b * h * (n + m) * d)
    return Case(title, f"B{b} H{h} {n} <- {m}, D{d}", rows, ("torch sdpa", "plain jnp"), work)


def _cudnn(query: Any, key: Any, value: Any) -> Any:
    if jax.default_backend() != "gpu" or query.dtype != jnp.bfloat16:
        raise ImportError("cuDNN's attention takes bfloat16 on a GPU")
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
