"""The benchmark's peers compute what ours do."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import importlib

import pytest

from tests.bench.tiny import SIZES
from xattn.bench import WORKLOADS, Request
from xattn.bench.measure import run_case

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("workload", ["W1", "W2", "W3", "W4", "W5"])
def test_all_rows_agree(workload, monkeypatch):
    monkeypatch.setattr("xattn.bench.measure.peak_mb", lambda *_: 1.0)
    request = Request(workload, mode="one-core", threads=1, budget_s=0.0)
    cases = importlib.import_module(WORKLOADS[workload]).cases(request, **SIZES[workload])
    for case in cases[: 1 if workload == "W3" else None]:  # its training step takes a minute to compile
        block = run_case(case, request)
        assert {row["name"]: row["status"] for row in block["rows"]} == {row.name: "ok" for row in case.rows}
        assert {goal["verdict"] for goal in block["goals"]} <= {"pass", "fail", "noisy"}
