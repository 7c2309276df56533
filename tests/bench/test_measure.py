"""What a block of the report holds, with programs that take no time."""

import dataclasses
import functools
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.bench.tiny import SIZES
from xattn.bench import WORKLOADS, Request
from xattn.bench.measure import (
    Case,
    Program,
    Row,
    Work,
    _timed,
    alternate,
    difference,
    floor,
    jitted,
    print_peak,
    run_case,
)

REQUEST = Request("W1", mode="one-core", threads=1, budget_s=0.0)


def row(name, kind, value=1.0, **options):
    return Row(name, kind, lambda: Program(lambda: np.full(3, value)), **options)


def raising(error):
    def make():
        raise error

    return make


def rows_of(*rows, request=REQUEST):
    block = run_case(Case("core", "tiny", rows, ("theirs",)), request)
    return {row["name"]: row for row in block["rows"]}, block


def test_what_differs_from_the_reference_gets_no_time():
    found, _ = rows_of(row("ours", "ours", 1.1), row("plain", "reference"), row("theirs", "peer", 1 + 1e-6))
    assert found["ours"]["status"] == "mismatch" and found["ours"]["max_err"] == pytest.approx(0.1)
    assert not {"med_ms", "ratio"} & set(found["ours"])
    assert found["theirs"]["status"] == found["plain"]["status"] == "ok" and found["theirs"]["med_ms"] > 0
    assert found["theirs"]["ratio"] == 1.0 and "max_err" not in found["plain"]


def test_rows_that_compute_something_else_are_compared_with_their_group():
    found, _ = rows_of(
        row("ours", "ours"),
        row("theirs", "peer"),
        row("ours, wide", "ours", 2.0, group="wide"),
        row("theirs, wide", "peer", 2.0, group="wide"),
        row("ours, rough", "ours", 1.05, tolerance=0.1),
        row("alone", "ours", 7.0, group=None),
    )
    assert {row["status"] for row in found.values()} == {"ok"}


def test_nan_and_another_shape_differ():
    assert difference([np.zeros(3)], [np.zeros(4)]) == float("inf")
    assert np.isnan(difference([np.ones(3), np.full(2, np.nan)], [np.ones(3), np.ones(2)]))
    found, _ = rows_of(row("ours", "ours", np.nan), row("theirs", "reference"))
    assert found["ours"]["status"] == "mismatch"


def test_absent_packages_and_too_little_memory_are_statuses():
    found, block = rows_of(
        Row("theirs", "peer", raising(ImportError("no torch")), package="torch"),
        Row("large", "ours", raising(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))),
        row("ours", "ours"),
    )
    assert (found["theirs"]["status"], found["large"]["status"]) == ("absent", "oom")
    assert found["theirs"]["why"] == "no torch" and block["baseline"] == "ours"
    with pytest.raises(RuntimeError, match="a bug"):
        rows_of(Row("ours", "ours", raising(RuntimeError("a bug"))))


def test_peers_that_nobody_asked_for_are_left_out():
    request = Request("W1", mode="one-core", threads=1, budget_s=0.0, peers=["timm"])
    found, _ = rows_of(row("ours", "ours"), row("a", "peer", package="torch"), row("b", "peer", package="timm"))
    assert set(found) == {"ours", "a", "b"}
    found, _ = rows_of(
        row("ours", "ours"), row("a", "peer", package="torch"), row("b", "peer", package="timm"), request=request
    )
    assert set(found) == {"ours", "b"}


def test_a_row_of_the_dtype_that_is_asked_for_is_left_out():
    rows = [row("ours", "ours"), row("ours bf16", "ours", dtype="bf16")]
    assert set(rows_of(*rows)[0]) == {"ours", "ours bf16"}
    assert set(rows_of(*rows, request=dataclasses.replace(REQUEST, dtype="bf16"))[0]) == {"ours"}


def test_a_sample_waits_once_for_all_its_calls():
    seen = []
    program = Program(lambda: seen.append("call"), wait=lambda _: seen.append("wait"))
    wall, _ = _timed(program, 20)()
    assert seen == ["call"] * 20 + ["wait"] and wall > 0


def test_rounds_call_everything_once_in_an_order_drawn_anew():
    called = []
    samples = {name: lambda name=name: (called.append(name), (0.001, 0.001))[1] for name in "abcd"}
    rounds = alternate(samples, budget_s=0.0)
    orders = {tuple(called[4 * i : 4 * i + 4]) for i in range(5)}
    assert len(rounds) == 5 and len(orders) > 1 and all(set(order) == set("abcd") for order in orders)
    assert all(set(each.times) == set("abcd") and each.foreign >= 0 for each in rounds)
    again = called[:]
    called.clear()
    alternate(samples, budget_s=0.0)
    assert called == again


def test_floor_is_the_slower_of_computing_and_moving():
    rates = {"f32_flops": 1e9, "bf16_flops": 2e9, "exps": 1e8, "bandwidth": 1e10}
    on_cpu, on_device = (functools.partial(floor, roofline=rates, mode=mode) for mode in ("one-core", "device"))
    assert on_cpu(Work(1e9, 1e8, 1e9), "f32") == 2000 and on_cpu(Work(1e9, 1e8, 1e9), "bf16") == 1500
    assert on_device(Work(1e9, 1e8, 1e9), "f32") == 1000 and on_device(Work(1e9, 2e8, 1e9), "f32") == 2000
    assert on_cpu(Work(1e9, 0, 1e11), "f32") == on_device(Work(1e9, 0, 1e11), "f32") == 10_000
    assert on_cpu(Work(), "f32") is None and floor(Work(1e9), "f32", {}, "device") is None


def test_compiled_programs_tell_their_memory_and_their_time():
    program = jitted(lambda x: jnp.sort(jnp.exp(x) @ x), jnp.ones((256, 256)))
    assert program.compile_s > 0 and program.temp_mb >= 0.2
    np.testing.assert_allclose(program.run()[0, 0], 256 * np.e, rtol=1e-5)


@pytest.mark.parametrize("workload", ["W1", "W2", "W4"])
def test_blocks_have_the_keys_of_the_schema(workload, monkeypatch):
    monkeypatch.setattr("xattn.bench.measure.peak_mb", lambda *_: 1.0)
    roofline = {"f32_flops": 1e9, "bf16_flops": 2e9, "exps": 1e8, "bandwidth": 1e10}
    request = Request(workload, suite="quick", mode="one-core", threads=1, budget_s=0.0, peers=[], roofline=roofline)
    for case in importlib.import_module(WORKLOADS[workload]).cases(request, **SIZES[workload]):
        block = json.loads(json.dumps(run_case(case, request)))
        assert set(block) == {
            *("id", "title", "shape", "dtype", "flops", "bytes", "exps", "floor_ms", "baseline", "rows", "goals")
        }
        assert {row["status"] for row in block["rows"]} == {"ok"}, block["rows"]
        for row in block["rows"]:
            assert {
                *("name", "kind", "status", "ratio", "q1", "q3", "rmin", "rcpu", "med_ms", "min_ms", "cpu_ms"),
                *("gflops", "frac_of_floor", "temp_mb", "compile_s", "rounds", "foreign_load"),
            } <= set(row)
            assert row["kind"] != "ours" or "max_err" in row
            assert ("peak_mb" in row) == (row["kind"] == "ours" and block["title"] in ("encode", "gradients"))
        for goal in block["goals"]:
            assert set(goal) == {"row", "vs", "metric", "max", "value", "verdict"}
            assert goal["verdict"] in ("pass", "fail", "noisy", "n/a")


def test_a_counted_block_has_bytes_and_no_times():
    request = Request("W6", suite="quick", mode="one-core", threads=1, budget_s=0.0, peers=[])
    forward, _ = importlib.import_module(WORKLOADS["W6"]).cases(request, **SIZES["W6"])
    block = json.loads(json.dumps(run_case(forward, request)))
    rows = {row["name"]: row for row in block["rows"]}
    for row in rows.values():
        assert row["status"] == "ok" and {"sent_mb", "collectives", "temp_mb", "compile_s"} <= set(row)
        assert not {"ratio", "med_ms", "rounds", "gflops"} & set(row)
    # Of 16 queries a device has 2 with 2 heads of 4 and a statistic of each; keys and values of 8 places.
    q, s, kv = 4 * 2 * 2 * 4, 4 * 2 * 2, 4 * 2 * 8 * 2 * 4
    sent = {name: round(1e6 * row["sent_mb"]) for name, row in rows.items()}
    assert sent["xattn gather"] == 7 * (2 * q + 3 * s) and rows["xattn gather"]["collectives"] == 3
    assert sent["xattn ring (LV-XAttn)"] == 15 * q + 7 * s
    assert sent["ring of keys and values"] == 7 * kv
    assert rows["xattn gather"]["of_formula"] == 1 and "of_formula" not in rows["plain jnp, partitioned"]
    assert "max_err" in rows["xattn ring (LV-XAttn)"]
    assert {goal["verdict"] for goal in block["goals"]} == {"pass"} and len(block["goals"]) == 4


def test_peak_is_that_of_the_second_call(capsys):
    print_peak(Request("W1", mode="one-core", sizes=SIZES["W1"]).to_json(), "core", "plain jnp")
    assert 0 <= float(capsys.readouterr().out) < 50
