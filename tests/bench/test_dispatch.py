"""Each choice by sizes has its neighbours beside it, and a goal against each of them."""

import functools
import re

import jax
import numpy as np
import pytest

from xattn.bench import Request, dispatch, peers
from xattn.bench.dispatch import Attention, Layer
from xattn.bench.measure import run_case
from xattn.ops.attention import dot_product_attention

REQUEST = Request("dispatch", budget_s=0.0, mode="one-core", threads=1)


def blocks(**sizes):
    return dispatch.cases(REQUEST, **{"attention": (), "layers": ()} | sizes)


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        ((1, 2048, 2048, 8, 64), "chunked 256"),
        ((1, 512, 1024, 8, 64), "chunked 128"),
        ((1, 128, 50176, 1, 64), "chunked"),
        ((1, 512, 512, 8, 64), "xla"),
        ((2, 4096, 77, 8, 40), "xla"),
    ],
)
def test_the_goal_is_of_what_attention_chooses(sizes, chosen):
    forward, gradients = blocks(attention=(Attention(*sizes),))
    assert {goal.row for goal in forward.goals} == {goal.row for goal in gradients.goals} == {chosen}
    assert {goal.against for goal in forward.goals} == {row.name for row in forward.rows} - {chosen}


@pytest.mark.parametrize(
    ("sizes", "chosen"), [((8, 16, 1024, 512, 8, 64), "absorbed"), ((8, 64, 1024, 512, 8, 64), "projected")]
)
def test_the_goal_is_of_what_the_layer_chooses(sizes, chosen):
    forward, _ = blocks(layers=(Layer(*sizes),))
    (goal,) = forward.goals
    assert (goal.row, goal.against) == (chosen, {"absorbed": "projected", "projected": "absorbed"}[chosen])


@pytest.mark.parametrize("sizes", dispatch.ATTENTION)
def test_what_is_said_to_be_chosen_is_what_runs(sizes):
    forward, _ = blocks(attention=(sizes,))
    b, n, m, h, d = sizes
    qkv = [jax.ShapeDtypeStruct((b, length, h, d), "float32") for length in (n, m, m)]
    chosen = forward.goals[0].row
    named = {"key_chunk_size": int(chosen.split()[1])} if " " in chosen else {"implementation": chosen}
    programs = [
        str(jax.make_jaxpr(functools.partial(dot_product_attention, **options))(*qkv)) for options in ({}, named)
    ]
    assert _without_addresses(programs[0]) == _without_addresses(programs[1])


def test_on_an_accelerator_the_fused_kernel_stands_beside_the_choice(monkeypatch):
    request = Request("dispatch", budget_s=0.0, mode="device", dtype="bf16")
    sizes = (Attention(1, 64, 64, 2, 8),)
    assert [row.name for row in dispatch.cases(request, attention=sizes)[0].rows] == ["xla"]
    monkeypatch.setattr(dispatch, "pick", lambda *arrays, fused=False: "cudnn" if fused else "xla")
    forward, gradients = dispatch.cases(request, attention=sizes)
    # Each time queries, keys and values are rolled, and so are the output and the gradients, if that of it were too.
    out = np.asarray(forward.rows[0].make().run(), np.float32)
    assert out.shape == (dispatch.REPEATS, 1, 64, 2, 8)
    np.testing.assert_allclose(out[1], np.roll(out[0], 1, axis=1), atol=2e-2)
    plain = [peers.normal(1, 64, 2, 8, seed=seed) for seed in (0, 1, 2)]
    towards = peers.normal(1, 64, 2, 8, seed=9)
    wanted = jax.vjp(dot_product_attention, *(np.roll(x, 3, axis=1) for x in plain))[1](towards)
    for got, expected in zip(gradients.rows[0].make().run(), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(got[3], np.float32), expected, atol=0.05)
    for case in (forward, gradients):
        assert [row.name for row in case.rows] == ["xla", "cudnn"]
        assert [(goal.row, goal.against) for goal in case.goals] == [("xla", "cudnn")]


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "", text)


def test_all_ways_agree_and_each_goal_gets_a_verdict():
    for case in blocks(attention=(Attention(1, 8, 24, 2, 4),), layers=(Layer(1, 2, 24, 6, 2, 4),)):
        block = run_case(case, REQUEST)
        assert {row["status"] for row in block["rows"]} == {"ok"}
        assert block["goals"] and {goal["verdict"] for goal in block["goals"]} <= {"pass", "fail", "noisy"}
