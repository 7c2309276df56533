"""Whether what is chosen by sizes is the fastest: each choice beside its neighbours, on both sides of each boundary.

Attention blocks time the whole score matrix ("xla") beside chunks of keys of several sizes ("chunked": of one size
forward, of another one backward), layer blocks the absorbed projections beside projected keys and values, forward and
with gradients. On an accelerator there are attention blocks alone, of the fused kernel beside the whole score matrix,
several times in one program as in a model. The goal of each block is that what `dot_product_attention` and
`CrossAttention` choose takes at most `LOSS` times as long as the fastest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xattn.bench import Request, peers
from xattn.bench.goals import Goal
from xattn.bench.measure import Case, Program, Row, jitted
from xattn.ops.attention import dot_product_attention
from xattn.ops.attention.absorbed import Affine, absorbed_attention, absorbing_pays
from xattn.ops.attention.api import pick
from xattn.ops.attention.chunked import block_size
from xattn.ops.products import einsum

LOSS = 1.05
REPEATS = 8
"""Times that a program on an accelerator does the same with other arrays: a program of one would be all launch."""


class Attention(NamedTuple):
    """Sizes of query [B, N, H, D] and key [B, M, H, D]."""

    batch: int
    queries: int
    keys: int
    heads: int
    width: int


class Layer(NamedTuple):
    """Sizes of queries [B, N, H, D] that ask inputs [B, M, C]."""

    batch: int
    queries: int
    keys: int
    channels: int
    heads: int
    width: int


ATTENTION = (
    Attention(1, 512, 512, 8, 64),  # half of `CHUNKED_FROM`
    Attention(1, 512, 1024, 8, 64),
    Attention(1, 512, 2048, 8, 64),
    Attention(1, 2048, 2048, 8, 64),
    Attention(2, 4096, 77, 8, 40),  # fewer keys than a chunk
    Attention(16, 1024, 256, 8, 32),
    Attention(1, 512, 50176, 1, 64),  # larger chunks forward than backward
    Attention(1, 128, 50176, 1, 64),
    Attention(4, 32, 16384, 8, 64),
)
ON_DEVICE = (
    Attention(64, 4096, 77, 8, 40),
    Attention(256, 197, 197, 6, 64),
    Attention(64, 1, 401, 4, 64),
    Attention(32, 128, 128, 8, 64),
    Attention(2, 64, 64, 8, 64),
    Attention(1, 16, 16, 1, 16),
    Attention(8, 75, 5, 1, 64),
    Attention(1, 512, 512, 8, 128),
    Attention(4, 32, 16384, 8, 64),
    Attention(1, 2048, 2048, 8, 64),
)
LAYERS = (
    Layer(1, 512, 50176, 261, 1, 261),
    Layer(1, 256, 4096, 256, 1, 256),
    Layer(8, 1, 197, 128, 4, 32),
    Layer(8, 64, 1024, 512, 8, 64),
    Layer(8, 16, 1024, 512, 8, 64),
    Layer(2, 128, 4096, 64, 1, 256),
)


def cases(
    request: Request, attention: tuple[Attention, ...] | None = None, layers: tuple[Layer, ...] | None = None
) -> list[Case]:
    """Two blocks, forward and gradients, for each of the sizes: those above, unless they are given."""
    device = request.mode == "device"
    attention = (ON_DEVICE if device else ATTENTION) if attention is None else attention
    layers = (() if device else LAYERS) if layers is None else layers
    ways = [(_on_device if device else _attention)(request, sizes) for sizes in attention]
    ways += [_layer(sizes) for sizes in layers]
    return [block for way in ways for block in _blocks(request, *way)]


def _on_device(request: Request, sizes: Attention) -> tuple[str, str, dict[str, Callable[..., Any]], list[Any]]:
    b, n, m, h, d = sizes
    qkv = [peers.normal(b, length, h, d, seed=seed) for seed, length in enumerate((n, m, m))]
    arrays = [peers.array_of(request.dtype)(x) for x in qkv]
    chosen = pick(*arrays)

    def named(name: str) -> Callable[..., Any]:
        return lambda *qkv: dot_product_attention(*qkv, implementation=name)

    ways = {name: named(name) for name in dict.fromkeys((chosen, pick(*arrays, fused=True), "xla"))}
    return f"attention {n} <- {m}, B{b} H{h} D{d}", chosen, ways, qkv


def _attention(request: Request, sizes: Attention) -> tuple[str, str, dict[str, Callable[..., Any]], list[Any]]:
    b, n, m, h, d = sizes
    qkv = [peers.normal(b, length, h, d, seed=seed) for seed, length in enumerate((n, m, m))]

    def chunked(size: int) -> Callable[..., Any]:
        return lambda *qkv: dot_product_attention(*qkv, key_chunk_size=size)

    ways: dict[str, Callable[..., Any]] = {"xla": lambda *qkv: dot_product_attention(*qkv, implementation="xla")}
    others, chosen = {128, 256, 512}, pick(*qkv)
    if chosen == "chunked":
        _, forward, backward = block_size(*qkv, query_chunk_size=None, key_chunk_size=None)
        if forward == backward:
            chosen = f"chunked {forward}"
        else:
            ways = {"chunked": dot_product_attention} | ways
            others = others - {forward} | {forward // 2, 2 * forward}
    ways |= {f"chunked {size}": chunked(size) for size in sorted({min(m, size) for size in others})}
    return f"attention {n} <- {m}, B{b} H{h} D{d}", chosen, ways, qkv


def _layer(sizes: Layer) -> tuple[str, str, dict[str, Callable[..., Any]], list[Any]]:
    b, n, m, c, h, d = sizes
    query, inputs = peers.normal(b, n, h, d), peers.normal(b, m, c, seed=1)
    kernels = [c**-0.5 * peers.normal(c, h, d, seed=seed) for seed in (2, 3)]

    def absorbed(query: Any, inputs: Any, key: Any, value: Any) -> Any:
        return absorbed_attention(query, inputs, Affine(key), Affine(value))

    def projected(query: Any, inputs: Any, *kernels: Any) -> Any:
        return dot_product_attention(query, *(einsum("bmc,chd->bmhd", inputs, kernel) for kernel in kernels))

    pays = absorbing_pays(b, n, m, c, num_heads=h, num_kv_heads=h, width=d, v_width=d)
    ways = {"absorbed": absorbed, "projected": projected}
    return f"layer {n} <- {m}x{c}, B{b} H{h} D{d}", "absorbed" if pays else "projected", ways, [query, inputs, *kernels]


def _blocks(
    request: Request, title: str, chosen: str, ways: dict[str, Callable[..., Any]], arguments: list[Any]
) -> list[Case]:
    array = peers.array_of(request.dtype)
    towards, arrays = array(peers.normal(*arguments[0].shape, seed=9)), [array(x) for x in arguments]
    repeats = REPEATS if request.mode == "device" else 1
    if repeats > 1:
        arrays = [jnp.stack([jnp.roll(x, shift, axis=1) for shift in range(repeats)]) for x in arrays]

    def repeated(function: Callable[..., Any]) -> Callable[..., Any]:
        if repeats == 1:
            return function
        return lambda *stacks: jax.lax.map(lambda arrays: function(*arrays), stacks)

    def gradients(way: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: jax.grad(lambda *xs: jnp.vdot(way(*xs), towards), range(len(arrays)))(*arrays)

    def case(what: str, wrap: Callable[..., Any]) -> Case:
        def make(way: Callable[..., Any]) -> Callable[[], Program]:
            return lambda: jitted(repeated(wrap(way)), *arrays)

        name = f"{title}, {what}"
        rows = [Row(key, "ours", make(way), tolerance=1e-4) for key, way in ways.items()]
        goals = [Goal("dispatch", name, chosen, other, "time", LOSS) for other in ways if other != chosen]
        shape = f"chosen: {chosen}" + (f", {repeats} in a program" if repeats > 1 else "")
        return Case(name, shape, rows, (chosen,), goals=goals)

    return [case("forward", lambda way: way), case("gradients", gradients)]
