"""W6: what devices send to each other for cross-attention whose queries and keys are split over eight of them.

A text of 512 tokens asks a video of 65536, 8 heads of 64. Bytes and collectives are counted in the programs that XLA
compiles for eight simulated devices: they are the same in every run, and nothing is timed. Shorter arrays go through
the same functions, which must agree.
"""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from xattn.analysis.collectives import count_collectives
from xattn.bench import SIMULATED, Request, peers
from xattn.bench.measure import Case, Program, Row, compiled, jitted
from xattn.ops.attention import dot_product_attention
from xattn.parallel.mesh import make_mesh

SHORT = 64, 512
"""Queries and keys of the programs that are run."""


def cases(request: Request, queries: int = 512, keys: int = 65536, num_heads: int = 8, width: int = 64) -> list[Case]:
    """The blocks; the process needs `SIMULATED` devices."""
    devices = SIMULATED[request.workload]
    mesh, array = make_mesh(data=1, sequence=devices), peers.array_of(request.dtype)
    split = NamedSharding(mesh, PartitionSpec(None, "sequence"))

    def program(attend: Any, backward: bool, formula: int | None) -> Program:
        def function(query: Any, key: Any, value: Any, d_out: Any) -> Any:
            if not backward:
                return jax.lax.with_sharding_constraint(attend(query, key, value), split)
            out, pull = jax.vjp(attend, query, key, value)
            return jax.lax.with_sharding_constraint((out, *pull(d_out)), split)

        def shapes(queries: int, keys: int) -> list[tuple[int, ...]]:
            return [(1, length, num_heads, width) for length in (queries, keys, keys, queries)]

        dtype = array(0).dtype
        full = [jax.ShapeDtypeStruct(shape, dtype, sharding=split) for shape in shapes(queries, keys)]
        short = shapes(min(queries, SHORT[0]), min(keys, SHORT[1]))
        arrays = [jax.device_put(array(peers.normal(*shape, seed=i)), split) for i, shape in enumerate(short)]
        with jax.set_mesh(mesh):
            _, told = compiled(function, *full)
            run = jitted(function, *arrays).run
        traffic = count_collectives(told["hlo"]).values()
        sent = sum(each.bytes for each in traffic)
        counts = {"sent_mb": sent / 1e6, "collectives": sum(each.count for each in traffic)}
        counts |= {"of_formula": sent / formula} if formula else {}
        return Program(run, compile_s=told["compile_s"], temp_mb=told["temp_mb"], extra=lambda: counts)

    # Bytes of a device's queries, of its keys and values, of a float32 result for each, and of one a query and head.
    itemsize, hops = 2 if request.dtype == "bf16" else 4, devices - 1
    q, kv = (n // devices * num_heads * width for n in (queries, 2 * keys))
    o, d_kv, s = 4 * q, 4 * kv, 4 * queries // devices * num_heads
    q, kv = itemsize * q, itemsize * kv
    formulas = {
        "gather": (hops * (q + o + s + 2 * s), hops * (o + s + o)),
        "ring": (hops * q + devices * (o + s), hops * (q + o + 2 * s) + devices * o),
        "kv_ring": (hops * kv, hops * kv + devices * d_kv),
    }

    def case(title: str, backward: bool) -> Case:
        def row(name: str, kind: str, way: str) -> Row:
            attend = functools.partial(dot_product_attention, implementation=way)
            formula = sum(formulas[way]) if backward else formulas[way][0]
            return Row(name, kind, lambda: program(attend, backward, formula))

        rows = [
            row("xattn gather", "ours", "gather"),
            row("xattn ring (LV-XAttn)", "ours", "ring"),
            Row("plain jnp, partitioned", "reference", lambda: program(peers.plain_attention, backward, None)),
            row("ring of keys and values", "reference", "kv_ring"),
        ]
        shape = f"B1 {queries}x{num_heads}x{width} <- {keys}x{num_heads}x{width}, {devices} devices"
        return Case(title, shape, rows, ("plain jnp, partitioned",), timed=False)

    return [case("forward", False), case("forward and backward", True)]
