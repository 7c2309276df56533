"""The command: what children are started with, exit codes, mistakes, and a run from end to end."""

import json
import os
import subprocess
import sys

import pytest

from tests.bench.tiny import SIZES
from xattn.bench import Request
from xattn.bench.runner import MALLOC, environment, exit_code, main, middle, run, table
from xattn.cli import main as xattn
from xattn.config import UsageError


def report(*verdicts, **block):
    return {"workloads": [{"goals": [{"verdict": verdict} for verdict in verdicts]} | block]}


def test_check_is_1_for_a_miss_and_2_for_noise_alone():
    assert exit_code(report()) == exit_code(report("pass", "n/a")) == 0
    assert exit_code(report("pass", "noisy", "n/a")) == 2
    assert exit_code(report("pass", "noisy", "fail")) == 1
    assert exit_code({"workloads": [{"id": "W1", "error": "its process ended with -9"}]}) == 1


def test_children_on_the_cpu_get_allocator_and_threads_and_those_of_an_accelerator_what_is_there():
    found = environment("one-core", 1)
    assert MALLOC.items() <= found.items() and set(MALLOC) == {
        "MALLOC_MMAP_MAX_",
        "MALLOC_TRIM_THRESHOLD_",
        "MALLOC_TOP_PAD_",
    }
    assert found["OMP_WAIT_POLICY"] == "passive" and found["OMP_NUM_THREADS"] == "1"
    assert found["JAX_PLATFORMS"] == "cpu" and environment("two-core", 2)["OMP_NUM_THREADS"] == "2"
    assert environment("device", 8) == os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def test_devices_are_simulated_for_a_workload_that_counts_on_them(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    for mode in ("one-core", "device"):
        found = environment(mode, 1, "W6")
        assert found["XLA_FLAGS"] == "--xla_cpu_use_fusion_emitters=false --xla_force_host_platform_device_count=8"
        assert found["JAX_PLATFORMS"] == "cpu"
    assert environment("one-core", 1, "W1")["XLA_FLAGS"] == "--xla_cpu_use_fusion_emitters=false"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "W9"], "there is no workload 'W9': did you mean"),
        (["--peers", "tensorflow"], "there is no peer 'tensorflow'"),
        (["--mode", "two-core", "--threads", "10000"], "10000 threads do not fit"),
        (["--mode", "one-core", "--threads", "2"], "--threads 2 needs --mode two-core"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments, message, capsys):
    with pytest.raises(UsageError, match=message):
        main(arguments)
    assert xattn(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_is_that_of_the_benchmark(capsys):
    with pytest.raises(SystemExit) as stop:
        xattn(["bench", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--budget-s" in printed and "--check" in printed and "W7b" in printed


@pytest.mark.slow
def test_a_run_from_end_to_end(tmp_path, capsys):
    path = tmp_path / "bench.json"
    request = Request("", mode="one-core", threads=1, budget_s=0.0, peers=[])
    before = os.sched_getaffinity(0)
    found = run(request, ["W1"], path, SIZES)
    assert os.sched_getaffinity(0) == before and json.loads(path.read_text()) == found
    assert found["schema"] == "xattn.bench/1" and set(found["roofline"]) == {
        *("f32_flops", "bf16_flops", "bandwidth", "exps")
    }
    assert {"versions", "cpu", "threads", "malloc", "devices", "mode"} == set(found["env"])
    assert found["env"]["malloc"] == MALLOC and found["env"]["threads"] == 1 and len(found["env"]["devices"]) >= 1
    assert [block["title"] for block in found["workloads"]] == ["forward", "cached K/V", "core", "gradients"]
    printed = capsys.readouterr().out
    assert "W1 gradients  f32" in printed and "flax MHDPA" in printed and "this machine:" in printed


def test_a_child_that_dies_leaves_the_others(monkeypatch, tmp_path, capsys):
    roofline = {"f32_flops": 1.0, "bf16_flops": 1.0, "bandwidth": 1.0, "exps": 1.0}

    def child(module, argument, request):
        if module == "roofline":
            return {"env": {}, "roofline": roofline}
        if json.loads(argument)["workload"] == "W1":
            raise subprocess.CalledProcessError(-9, "W1")
        return [{"id": "W2", "error": "a second one"}]

    monkeypatch.setattr("xattn.bench.runner._child", child)
    found = run(Request(""), ["W1", "W2"], tmp_path / "out.json")
    assert [block["id"] for block in found["workloads"]] == ["W1", "W2"]
    assert "W1: its process ended with -9" in capsys.readouterr().out


def test_of_several_runs_the_medians_count():
    def run(ms, value, verdict, status="ok"):
        row = {"name": "ours", "status": status} | ({"med_ms": ms, "rounds": 5} if status == "ok" else {})
        goal = {"row": "ours", "vs": "other", "metric": "time", "max": 1.05, "value": value, "verdict": verdict}
        return [{"id": "dispatch", "title": "block", "rows": [row], "goals": [goal]}]

    (block,) = middle([run(3.0, 1.2, "fail"), run(1.0, 1.0, "pass"), run(2.0, 1.04, "noisy")])
    assert block["runs"] == 3 and block["rows"][0]["med_ms"] == 2.0 and block["rows"][0]["name"] == "ours"
    assert (block["goals"][0]["value"], block["goals"][0]["verdict"]) == (1.04, "pass")
    (block,) = middle([run(3.0, 1.2, "fail"), run(1.0, 1.06, "noisy"), run(2.0, 1.04, "noisy")])
    assert (block["goals"][0]["value"], block["goals"][0]["verdict"]) == (1.06, "noisy")
    (block,) = middle([run(3.0, 1.2, "fail"), run(1.0, 1.06, "fail"), run(2.0, 1.04, "pass")])
    assert block["goals"][0]["verdict"] == "fail"
    (block,) = middle([run(3.0, 1.0, "pass"), run(1.0, None, "fail", "mismatch"), run(2.0, 1.0, "pass")])
    assert block["rows"][0]["status"] == "mismatch" and block["goals"][0]["verdict"] == "fail"
    alone = run(3.0, 1.2, "fail")
    assert middle([alone]) == alone


def test_the_table_has_ours_first_and_goals_under_their_rows():
    row = {"status": "ok", "dtype": "f32", "q1": 0.5, "q3": 0.6, "med_ms": 9.0, "cpu_ms": 8.0, "rounds": 7}
    row |= {"foreign_load": 0.02}
    rows = [
        row | {"name": "theirs", "kind": "peer", "ratio": 1.0, "rcpu": 1.0},
        row | {"name": "slow", "kind": "ours", "ratio": 2.0, "rcpu": 0.4},
        row | {"name": "fast", "kind": "ours", "ratio": 0.5, "rcpu": 0.6},
        {"name": "gone", "kind": "peer", "status": "absent"},
    ]
    goal = {"row": "fast", "vs": "theirs", "metric": "time", "max": 0.7, "value": 0.5, "verdict": "pass"}
    block = {"id": "W1", "title": "core", "dtype": "f32", "shape": "small", "flops": 2e9, "floor_ms": 4.0}
    block |= {"baseline": "theirs", "rows": rows, "goals": [goal]}
    lines = table(block, "two-core").splitlines()
    assert [line.split()[0] for line in lines] == ["W1", "name", "fast", "time", "slow", "theirs", "gone"]
    assert "2.00 GFLOP  floor 4 ms  two-core, 7 rounds, foreign 2 %" in lines[0]
    assert lines[3].strip() == "time 0.500 <= 0.700 x theirs: PASS" and "baseline" in lines[5]
    assert [line.split()[0] for line in table(block, "one-core").splitlines()[2:4]] == ["slow", "fast"]


def test_a_counted_block_shows_bytes_instead_of_times():
    few = {"name": "few", "kind": "ours", "status": "ok", "sent_mb": 1.878, "collectives": 3, "of_formula": 1.0}
    many = {"name": "many", "kind": "reference", "status": "ok", "sent_mb": 234.881, "collectives": 14}
    some = {"name": "some", "kind": "reference", "status": "ok", "sent_mb": 2.81, "collectives": 4}
    block = {"id": "W6", "title": "forward", "dtype": "f32", "shape": "small", "flops": 0, "floor_ms": None}
    block |= {"baseline": "some", "rows": [many, some, few], "goals": []}
    lines = table(block, "one-core").splitlines()
    assert lines[0] == "W6 forward  f32  small  counted, not timed"
    assert [line.split()[:4] for line in lines[2:]] == [
        ["few", "ours", "1.878", "3"],
        ["some", "reference", "2.810", "4"],
        ["many", "reference", "234.881", "14"],
    ]


def test_the_process_that_starts_the_others_does_without_jax():
    code = "import sys, xattn.bench.runner; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
