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
from xattn.bench.measure import Case, Program, Row, Work, jitted
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
    x, text, towards = (
        peers.normal(batch, *shape, seed=seed)
        for seed, shape in enumerate([(queries, width), (keys, context), (queries, width)])
    )
    model = CrossAttention(num_heads, qk_features=width, use_bias=False, out_bias=True)
    params = peers.variables(model, x, text)["params"]
    plain, jax_nn = peers.jnp_library(dtype=dtype), peers.jnp_library(jax.nn.dot_product_attention, dtype)
    references = {"plain jnp": plain, "jax.nn.dot_product_attention": jax_nn}

    def ours(**precision: Any) -> Callable[..., Any]:
        layer = model.clone(**precision)
        return lambda params, x, text: layer.apply({"params": params}, x, text)

    def flax(params: Any, x: Any, text: Any) -> Any:
        # Linen's module has all biases or none.
        zeros = jnp.zeros((num_heads, width // num_heads), x.dtype)
        full = {key: {"bias": zeros} | value for key, value in params.items()}
        return nn.MultiHeadDotProductAttention(num_heads, qkv_features=width).apply({"params": full}, x, text)

    def reference(lib: Any) -> Callable[..., Any]:
        def layer(params: Any, x: Any, text: Any) -> Any:
            return peers.attention(lib, params, x, peers.keys_values(lib, params, text, num_heads), num_heads)

        return layer

    in_jax = (jax.tree.map(array, params), array(x), array(text))
    flat = (plain.params(params), array(x), array(text))

    def forward(function: Callable, arguments: tuple = in_jax) -> Callable[[], Program]:
        return lambda: jitted(function, *arguments)

    def torch_forward() -> Program:
        lib = peers.torch_library(dtype)
        arguments = (lib.params(params), lib.array(x), lib.array(text))
        return Program(peers.torch_run(lambda: reference(lib)(*arguments)), peers.from_torch)

    def torch_module() -> Program:
        torch, lib = peers.torch_package(), peers.torch_library(dtype)
        module = torch.nn.MultiheadAttention(width, num_heads, kdim=context, vdim=context, batch_first=True)
        p = peers.flatten(params, np.asarray, transpose=True)
        state = {f"{name[0]}_proj_weight": p[name]["kernel"] for name in ("query", "key", "value")}
        state |= {f"out_proj.{end}": p["out"][name] for end, name in (("weight", "kernel"), ("bias", "bias"))}
        module = peers.load(module, state | {"in_proj_bias": np.zeros(3 * width)}, dtype)
        asks, reads = lib.array(x), lib.array(text)
        run = peers.torch_run(lambda: module(asks, reads, reads, need_weights=False)[0])
        return Program(run, peers.from_torch)

    core, cache = batch * num_heads * queries * keys, 2 * batch * keys * width
    projections = 4 * batch * queries * width**2
    weights, tokens = 2 * width**2 + 2 * context * width, 2 * batch * queries * width
    attend = 4 * batch * queries * keys * width
    made = projections + 4 * batch * keys * context * width + attend
    moved = weights + tokens + batch * keys * context
    shape = f"B{batch} {queries}x{width} <- {keys}x{context}, {num_heads} heads of {width // num_heads}"
    baseline = ("torch sdpa", "plain jnp")
    bf16: dict[str, Any] = dict(tolerance=1e-2, dtype="bf16")
    torch: dict[str, Any] = dict(package="torch")
    whole = Case(
        "forward",
        shape,
        [
            Row("xattn", "ours", forward(ours())),
            # The place for products in bfloat16 that are summed in float32, once the core has them as a mode.
            Row("xattn bf16", "ours", forward(ours(dtype=jnp.bfloat16)), **bf16),
            *(Row(name, "reference", forward(reference(lib), flat)) for name, lib in references.items()),
            Row("flax MHDPA", "reference", forward(flax)),
            Row("torch sdpa", "peer", torch_forward, **torch),
            Row("torch nn.MultiheadAttention", "peer", torch_module, **torch),
        ],
        baseline,
        Work(made, core, itemsize * moved),
    )

    def cached_ours() -> Program:
        params, x, text = in_jax
        kv = model.apply({"params": params}, text, method="project_kv")
        return jitted(lambda params, x, kv: model.apply({"params": params}, x, kv=kv), params, x, kv)

    def cached(lib: Any) -> Callable[[], Program]:
        params, x, text = flat
        kv = peers.keys_values(lib, params, text, num_heads)
        return lambda: jitted(lambda params, x, kv: peers.attention(lib, params, x, kv, num_heads), params, x, kv)

    def torch_cached() -> Program:
        lib = peers.torch_library(dtype)
        p, asks = lib.params(params), lib.array(x)
        kv = peers.keys_values(lib, p, lib.array(text), num_heads)
        return Program(peers.torch_run(lambda: peers.attention(lib, p, asks, kv, num_heads)), peers.from_torch)

    reused = Case(
        "cached K/V",
        shape,
        [
            Row("xattn", "ours", cached_ours),
            *(Row(name, "reference", cached(lib)) for name, lib in references.items()),
            Row("torch sdpa", "peer", torch_cached, **torch),
        ],
        baseline,
        Work(projections + attend, core, itemsize * (2 * width**2 + tokens + cache)),
    )

    head = width // num_heads
    qkv = [peers.normal(batch, n, num_heads, head, seed=n) for n in (queries, keys, keys + 1)]
    qkv[2] = qkv[2][:, :keys]
    alone = Case(
        "core",
        f"B{batch} H{num_heads} {queries} <- {keys}, D{head}",
        _core_rows(qkv, request),
        baseline,
        Work(attend, core, itemsize * (tokens + cache)),
    )

    def gradients(function: Callable, arguments: tuple = in_jax) -> Callable[[], Program]:
        pulled = array(towards)

        def run(params: Any, x: Any, text: Any, pulled: Any) -> Any:
            return jax.vjp(function, params, x, text)[1](pulled)

        def view(outputs: Any) -> Any:
            return [(peers.flatten(p, lambda x: x), *others) for p, *others in outputs]

        return lambda: jitted(run, *arguments, pulled, view=view)

    def torch_gradients() -> Program:
        torch, lib = peers.torch_package(), peers.torch_library(dtype)
        arguments = (lib.params(params), lib.array(x), lib.array(text))
        leaves, treedef = jax.tree.flatten(arguments)
        for leaf in leaves:
            leaf.requires_grad_()
        pulled = lib.array(towards)

        def run() -> Any:
            return peers.finished(torch.autograd.grad(reference(lib)(*arguments), leaves, pulled))

        def view(outputs: Any) -> Any:
            trees = [jax.tree.unflatten(treedef, peers.from_torch(grads)) for grads in outputs]
            return [(peers.flatten(p, lambda x: x, transpose=True), *others) for p, *others in trees]

        return Program(run, view)

    backward = Case(
        "gradients",
        shape,
        [
            Row("xattn", "ours", gradients(ours())),
            *(Row(name, "reference", gradients(reference(lib), flat)) for name, lib in references.items()),
            Row("flax MHDPA", "reference", gradients(flax)),
            Row("torch sdpa", "peer", torch_gradients, **torch),
        ],
        baseline,
        Work(3 * made, core, itemsize * 2 * moved),
    )
    blocks = [whole, reused, alone, backward]
    if device:
        b, h, n, d = long
        qkv = [peers.normal(b, n, h, d, seed=seed) for seed in range(3)]
        work = Work(4 * b * h * n * n * d, b * h * n * n, itemsize * 4 * b * h * n * d)
        rows = [row for row in _core_rows(qkv, request) if row.name != "plain jnp"]  # 17 GB of scores
        blocks.append(Case("long core", f"B{b} H{h} {n} <- {n}, D{d}", rows, baseline[:1], work))
    return blocks


def _core_rows(qkv: list, request: Request) -> list[Row]:
    array = peers.array_of(request.dtype)

    def program(attend: Callable) -> Callable[[], Program]:
        return lambda: jitted(attend, *map(array, qkv))

    def torch_core() -> Program:
        lib = peers.torch_library(request.dtype)
        tensors = [lib.array(x) for x in qkv]
        return Program(peers.torch_run(lambda: lib.attend(*tensors)), peers.from_torch)

    rows = [
        Row("xattn", "ours", program(dot_product_attention)),
        Row("plain jnp", "reference", program(peers.plain_attention)),
        Row("jax.nn.dot_product_attention", "reference", program(jax.nn.dot_product_attention)),
        Row("torch sdpa", "peer", torch_core, package="torch"),
    ]
    if request.mode == "device" and request.dtype == "bf16" and jax.default_backend() == "gpu":
        cudnn = program(lambda *qkv: jax.nn.dot_product_attention(*qkv, implementation="cudnn"))
        rows.append(Row("cudnn", "reference", cudnn))
    return rows
