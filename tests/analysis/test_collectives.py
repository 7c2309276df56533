"""Bytes and counts of collectives in programs whose communication fits on a line, and in HLO of other devices."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xattn.analysis.collectives import Traffic, count_collectives, gathered_at_once
from xattn.analysis.step_cost import GATHERING_OPTIONS
from xattn.parallel.mesh import make_mesh

MESH = make_mesh(2, 4)  # the groups of `fsdp` have four devices, those of `data` two
X = jax.ShapeDtypeStruct((16, 6), jnp.float32)  # a device of `fsdp` has four rows:
SHARD = 4 * 6 * 4  # bytes
NEXT = [(i, (i + 1) % 4) for i in range(4)]


SPLIT = P("fsdp")


def sent(function, x=X, outs=SPLIT):
    mapped = jax.shard_map(function, mesh=MESH, in_specs=SPLIT, out_specs=outs, check_vma=False)
    counts = count_collectives(jax.jit(mapped).lower(x).compile().as_text())
    return {kind: (traffic.count, traffic.bytes) for kind, traffic in counts.items()}


# One collective


@pytest.mark.parametrize(
    ("function", "outs", "expected"),
    [
        (lambda x: lax.psum(x, "fsdp"), P(), {"all-reduce": (1, 2 * 3 * SHARD // 4)}),
        (lambda x: lax.psum(x, "data"), P("fsdp"), {"all-reduce": (1, 2 * 1 * SHARD // 2)}),
        (lambda x: lax.psum(x, ("data", "fsdp")), P(), {"all-reduce": (1, 2 * 7 * SHARD // 8)}),
        (lambda x: lax.psum((x, x[0]), "fsdp"), P(), {"all-reduce": (1, 2 * 3 * (SHARD + SHARD // 4) // 4)}),
        (lambda x: lax.all_gather(x, "fsdp"), P(), {"all-gather": (1, 3 * SHARD)}),
        (lambda x: lax.psum_scatter(x, "fsdp", tiled=True), P("fsdp"), {"reduce-scatter": (1, 3 * SHARD // 4)}),
        (lambda x: lax.ppermute(x, "fsdp", NEXT), P("fsdp"), {"collective-permute": (1, SHARD)}),
        (lambda x: lax.all_to_all(x, "fsdp", 0, 1), P("fsdp"), {"all-to-all": (1, 3 * SHARD // 4)}),
        (lambda x: 2 * x, P("fsdp"), {}),
    ],
)
def test_a_collective_counts_what_one_device_sends(function, outs, expected):
    assert sent(function, outs=outs) == expected


@pytest.mark.parametrize(("dtype", "size"), [(jnp.int8, 1), (jnp.bool, 1), (jnp.int16, 2), (jnp.complex64, 8)])
def test_elements_count_their_bytes(dtype, size):
    x = jax.ShapeDtypeStruct(X.shape, dtype)
    assert sent(lambda x: lax.ppermute(x, "fsdp", NEXT), x) == {"collective-permute": (1, 4 * 6 * size)}


# Control flow


def hop(x, _):
    return lax.ppermute(x, "fsdp", NEXT) * 2, lax.psum(x, "data")


def test_a_loop_counts_its_trips_also_when_nested():
    looped = lambda x: lax.scan(hop, x, length=5)[0]  # noqa: E731
    assert sent(looped) == {"collective-permute": (5, 5 * SHARD)}  # nobody asked for the sums
    both = lambda x: lax.scan(hop, x, length=5)  # noqa: E731
    expected = {"collective-permute": (5, 5 * SHARD), "all-reduce": (5, 5 * SHARD)}
    assert sent(both, outs=(P("fsdp"), P(None, "fsdp"))) == expected
    nested = lambda x: lax.scan(lambda x, _: (looped(x), None), x, length=3)[0]  # noqa: E731
    assert sent(nested) == {"collective-permute": (15, 15 * SHARD)}


def test_a_loop_of_unknown_length_is_refused_if_it_sends():
    until = lambda change: lambda x: lax.while_loop(lambda x: jnp.sum(x) < 1e3, change, x)  # noqa: E731
    assert sent(until(lambda x: x + 1)) == {}
    with pytest.raises(ValueError, match="loop of unknown length around collective-permute"):
        sent(until(lambda x: hop(x, None)[0]))
    with pytest.raises(ValueError, match="loop of unknown length around all-reduce"):
        sent(lambda x: lax.while_loop(lambda x: lax.psum(jnp.sum(x), "fsdp") < 1e3, lambda x: x + 1, x))


def test_a_conditional_counts_its_dearest_branch():
    def branches(x):
        return lax.switch(
            jnp.int32(x[0, 0]), [lambda x: x, lambda x: lax.psum(x, "fsdp"), lambda x: lax.ppermute(x, "fsdp", NEXT)], x
        )

    assert sent(branches) == {"all-reduce": (1, 2 * 3 * SHARD // 4)}


# What the partitioner writes


def test_a_contraction_over_a_split_axis_reduces_and_a_regathered_output_gathers():
    split = lambda *spec: NamedSharding(MESH, P(*spec))  # noqa: E731
    x, w = jnp.zeros((8, 12)), jnp.zeros((12, 20))
    product = jax.jit(lambda x, w: x @ w, out_shardings=split("data"))
    program = product.lower(jax.device_put(x, split("data", "fsdp")), jax.device_put(w, split("fsdp"))).compile()
    assert count_collectives(program.as_text()) == {"all-reduce": Traffic(1, 2 * 3 * (4 * 20 * 4) // 4)}
    whole = jax.jit(lambda x: x + 1, out_shardings=split(None, "fsdp"))
    program = whole.lower(jax.device_put(x, split("data", "fsdp"))).compile()
    assert count_collectives(program.as_text()) == {"all-gather": Traffic(1, 8 * 3 * 4 // 2)}


# Texts as other compilers write them: all kinds of groups, and collectives that run while others work.


def program(*instructions):
    body = "\n".join(f"  {instruction}" for instruction in instructions)
    return f"HloModule m, replica_count=1, num_partitions=16\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{}", 16),
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,8]<=[16]", 8),
        ("[8,2]<=[2,8]T(1,0)", 2),
        ("mesh['a'=2,'b'=8] {'b'}", 8),
        ("mesh['a'=2,'b'=8] {'a','b'}", 16),
        ("mesh['a'=2,'b'=8], device_ids=([2,2,4]T(0,2,1)) {'b':(2)4}", 4),
    ],
)
def test_every_way_of_writing_groups(groups, size):
    line = f'ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, metadata={{op_name="x"}}'
    assert count_collectives(program(line)) == {"all-reduce": Traffic(1, 2 * 32 * (size - 1) // size)}


def test_asynchronous_collectives_count_their_result_once():
    text = program(
        "%p = f32[8]{0:T(256)} parameter(0)",
        "%a = (f32[8]{0:T(256)}, f32[32]{0:T(256)}) all-gather-start(%p), replica_groups=[4,4]<=[16]",
        "%b = f32[32]{0:T(256)} all-gather-done(%a)",
        "%c = ((f32[8]{0}, bf16[8]), (f32[32]{0}, bf16[32])) all-gather-start(%p, %q), replica_groups=[4,4]<=[16]",
        "%d = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
        "%e = f32[8]{0} collective-permute-done(%d)",
        "%f = (f32[8]{0}, f32[4]{0}) all-reduce-start(%p, %q), replica_groups=[4,4]<=[16], to_apply=%add",
        "%g = ((f32[8]{0}), f32[2]{0}, u32[]) reduce-scatter-start(%p), replica_groups=[4,4]<=[16], to_apply=%add",
    )
    assert count_collectives(text) == {
        "all-gather": Traffic(2, 3 * 128 // 4 + 3 * (128 + 64) // 4),
        "collective-permute": Traffic(1, 32),
        "all-reduce": Traffic(1, 2 * 3 * (32 + 16) // 4),
        "reduce-scatter": Traffic(1, 3 * 8),
    }


# What is gathered, and how long it is held


def gathered(function):
    """Bytes held at once, of a function of the shards [4, 6] of eight arrays."""
    mapped = jax.shard_map(function, mesh=MESH, in_specs=SPLIT, out_specs=SPLIT, check_vma=False)
    return gathered_at_once(jax.jit(mapped).lower([X] * 4).compile(GATHERING_OPTIONS).as_text())


def whole(x):
    return lax.all_gather(x, "fsdp", tiled=True)


def one_after_another(xs):
    total = xs[0]
    for x in xs:
        total = jnp.tanh(total @ whole(x).T @ whole(x)[:, :6])
    return total


def all_at_the_end_again(xs):
    """Each is used at once, and again after all others."""
    wholes = []
    total = xs[0]
    for x in xs:
        x, total = lax.optimization_barrier((x, total))  # gathered when it is needed
        wholes.append(whole(x))
        total = jnp.tanh(total @ wholes[-1].T @ wholes[-1])
    for w in wholes[::-1]:
        total = jnp.tanh(total @ w.T @ w)
    return total


def in_a_loop(xs):
    first = whole(xs[0])

    def layer(total, x):
        return jnp.tanh(total @ whole(x).T @ first), None

    return lax.scan(layer, xs[0], jnp.stack(xs))[0]


@pytest.mark.parametrize(("function", "arrays"), [(one_after_another, 1), (all_at_the_end_again, 4), (in_a_loop, 2)])
def test_what_is_gathered_is_held_until_its_last_use(function, arrays):
    assert gathered(function) == arrays * 4 * SHARD


def test_nothing_is_gathered():
    assert gathered(lambda xs: xs[0] + lax.psum(xs[1], "data")) == 0
