"""Verdicts over rounds that were made up."""

import dataclasses
import importlib
import json

import numpy as np
import pytest

from tests.bench.tiny import SIZES
from xattn.bench import FULL, WORKLOADS, Request
from xattn.bench.goals import GOALS, Goal, Round, statistics, usable, verdict

GOAL = Goal("W1", "core", "ours", "peer", "time", 0.7)
ROWS = {"ours": {"status": "ok", "temp_mb": 30.0}, "peer": {"status": "ok", "temp_mb": 60.0}}


def rounds(count=6, ours=0.6, cpu=1.2, foreign=0.0, spread=0.0):
    """The peer takes 1 s of wall-clock and 2 s of CPU time."""
    factors = 1 + spread * np.linspace(-1, 1, count)
    return [Round({"ours": (ours * x, cpu * x), "peer": (1.0, 2.0)}, foreign) for x in factors]


def found(measured, goal=GOAL, rows=ROWS, mode="two-core", threads=2):
    return verdict(goal, rows, measured, mode, threads)


def test_wall_clock_decides_on_two_cores_and_cpu_time_on_one():
    measured = rounds(ours=0.6, cpu=1.8)
    two, one = found(measured), found(measured, mode="one-core")
    assert (two["value"], two["verdict"]) == (pytest.approx(0.6), "pass")
    assert (one["value"], one["verdict"]) == (pytest.approx(0.9), "fail")


def test_few_quiet_rounds_and_spread_ones_give_no_verdict():
    assert found(rounds(4))["verdict"] == "noisy"
    loud = rounds(20, foreign=0.5)
    assert found(loud)["verdict"] == "noisy" and found(loud + rounds(5))["verdict"] == "pass"
    assert found(rounds(20, spread=0.6))["verdict"] == "noisy"
    # CPU time stands whatever else runs.
    assert found(loud, mode="one-core")["verdict"] == "pass"


def test_loud_rounds_are_left_out_where_enough_are_quiet():
    loud, quiet = rounds(9, ours=5.0, foreign=0.5), rounds(5)
    assert usable(loud + quiet, "two-core") == (quiet, True)
    assert usable(loud + quiet[1:], "two-core") == (loud + quiet[1:], False)
    assert statistics(quiet, "ours", "peer", "two-core")["ratio"] == pytest.approx(0.6)


def test_statistics_are_ratios_of_medians_and_quartiles_of_the_rounds():
    measured = [Round({"ours": (a, 2 * a), "peer": (b, b)}, 0.0) for a, b in [(1, 1), (2, 4), (4, 4), (6, 2), (3, 3)]]
    result = statistics(measured, "ours", "peer", "two-core")
    assert result["ratio"] == 1.0 and result["rcpu"] == 2.0 and result["rmin"] == 1.0
    assert (result["q1"], result["q3"]) == (1.0, 1.0) and result["med_ms"] == 3000
    assert statistics(measured, "ours", "peer", "one-core")["q1"] == 2.0


def test_a_row_that_differs_fails_and_an_absent_one_has_nothing_to_say():
    for name in ROWS:
        assert found([], rows=ROWS | {name: {"status": "mismatch"}})["verdict"] == "fail"
        assert found([], rows=ROWS | {name: {"status": "absent"}})["verdict"] == "n/a"
    assert found([], rows={"ours": ROWS["ours"]})["verdict"] == "n/a"
    assert found([], rows=ROWS | {"ours": {"status": "oom"}})["verdict"] == "fail"
    assert found([], rows=ROWS | {"peer": {"status": "oom"}})["verdict"] == "n/a"


def test_other_metrics_need_no_rounds():
    memory = GOAL._replace(metric="temp_mb")
    assert found([], memory) | {"value": 0.5, "verdict": "pass"} == found([], memory)
    alone = GOAL._replace(metric="temp_mb", against="", max=8.0)
    assert (found([], alone)["value"], found([], alone)["verdict"]) == (30.0, "fail")
    assert found([], alone, rows={"ours": {"status": "ok"}})["verdict"] == "n/a"
    assert found([], alone, rows={"ours": {"status": "ok", "temp_mb": 0}})["verdict"] == "pass"
    cores = found(rounds(ours=0.52), GOAL._replace(metric="of_cores", max=1.05))
    assert (cores["value"], cores["verdict"]) == (pytest.approx(1.04), "pass")


@pytest.mark.parametrize("workload", FULL)
def test_goals_name_rows_and_every_row_of_ours_has_one(workload):
    """But for the rows that only show something: QSFormer's forward pass, another decoder, augmentation."""
    request = Request(workload, mode="two-core")
    cases = importlib.import_module(WORKLOADS[workload]).cases(request, **SIZES[workload])
    goals = [goal for goal in GOALS if goal.workload == workload and goal.on == "cpu"]
    rows = {(case.title, row.name): row for case in cases for row in case.rows}
    for goal in goals:
        assert rows[goal.case, goal.row].kind == "ours"
        assert not goal.against or (goal.case, goal.against) in rows
    shown = {"xattn QSFormer", "xattn pillow", "xattn fast, one thread"}
    ours = {
        key for key, row in rows.items() if row.kind == "ours" and row.name not in shown and key[0] != "RandAugment"
    }
    assert ours == {(goal.case, goal.row) for goal in goals}
    for case in cases:
        assert set(case.baseline) <= {row.name for row in case.rows}


@pytest.mark.parametrize("workload", sorted({goal.workload for goal in GOALS if goal.on == "device"}))
def test_goals_of_the_accelerator_name_its_rows(workload):
    more = {"W1": {"long": (1, 1, 4, 4)}, "W3": {"vit": ("vit_small_patch16_224", 1, 224)}}.get(workload, {})
    cases = importlib.import_module(WORKLOADS[workload]).cases(
        Request(workload, mode="device", dtype="bf16"), **SIZES[workload], **more
    )
    rows = {(case.title, row.name) for case in cases for row in case.rows}
    for goal in GOALS:
        if (goal.on, goal.workload) == ("device", workload):
            assert (goal.case, goal.row) in rows
            assert not goal.against or (goal.case, goal.against) in rows


def test_a_share_of_the_floor_is_noisy_where_the_machine_is():
    goal = Goal("W3", "step", "xattn", "", "over_floor", 2.5)
    rows = {"xattn": {"status": "ok", "over_floor": 2.0}}
    for foreign, wanted in ((0.0, "pass"), (0.5, "noisy")):
        rounds = [Round({"xattn": (1.0, 1.0)}, foreign)] * 5
        assert verdict(goal, rows, rounds, "device", 1)["verdict"] == wanted


def test_request_survives_json():
    request = Request("W1", peers=["torch"], roofline={"f32_flops": 1.0}, sizes={"batch": 1})
    assert Request(**json.loads(request.to_json())) == request
    assert dataclasses.replace(request, workload="W2").workload == "W2"
