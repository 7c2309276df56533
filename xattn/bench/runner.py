"""The command `xattn bench`: starts one process a workload, prints their results, and checks the goals.

This process computes nothing and needs no jax: allocator, threads and cores of a process are settled when it starts.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xattn.bench import DTYPES, FULL, MODES, PEERS, QUICK, SIMULATED, WORKLOADS, Request
from xattn.config import UsageError, lookup, write_atomically

SCHEMA = "xattn.bench/1"
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
"""glibc maps every array above 32 MB anew and faults it in page by page; with these it keeps what was freed."""

RUNS = {"dispatch": 3}
"""Processes of a workload, one after the other, instead of one: neighbours that differ by a few percent change places
with the addresses of arrays and with what else a shared machine does for minutes."""

DEVICE_CEILINGS = {"side": 8192, "megabytes": 4096, "chain": 64, "copies": True}
"""Keywords of `xattn.bench.roofline.measure` on an accelerator, where a call takes as long as much arithmetic."""


def main(argv: Sequence[str]) -> int:
    """Runs the benchmarks that are asked for; returns 0, or with --check 1 for a missed goal and 2 for noise alone."""
    arguments = _parse(argv)
    chosen = arguments.only.split(",") if arguments.only else list(QUICK if arguments.suite == "quick" else FULL)
    chosen = ["dispatch"] if arguments.dispatch else chosen
    for workload in chosen:
        lookup(WORKLOADS, workload, "workload")
    peers = {"auto": None, "none": []}.get(arguments.peers, arguments.peers.split(","))
    for package in peers or ():
        lookup(dict.fromkeys(PEERS), package, "peer")
    mode = arguments.mode or _default_mode(arguments.suite)
    budget_s = (3.0 if arguments.suite == "quick" else 20.0) if arguments.budget_s is None else arguments.budget_s
    request = Request(
        workload="",
        suite=arguments.suite,
        mode=mode,
        threads=_threads(mode, arguments.threads),
        budget_s=budget_s,
        peers=peers,
        dtype=arguments.dtype or ("bf16" if mode == "device" else "f32"),
        profile=arguments.profile,
    )
    report = run(request, chosen, arguments.json)
    return exit_code(report) if arguments.check else int(any("error" in block for block in report["workloads"]))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="xattn bench",
        description="Times xattn and its peers by turns, as ratios of one run; docs/performance.md tells how to read "
        f"them. Workloads: {', '.join(WORKLOADS)}.",
    )
    quick = ", ".join(QUICK)
    parser.add_argument("--suite", choices=("quick", "full"), default="full", help=f"quick: {quick} on one core")
    parser.add_argument("--only", metavar="W1,W2", help="these workloads")
    parser.add_argument("--dispatch", action="store_true", help="only: each choice by sizes beside its neighbours")
    parser.add_argument("--mode", choices=MODES, help="default: device where there is one; for quick, one-core")
    parser.add_argument("--threads", type=int, metavar="N", help="cores instead of two, in two-core mode")
    parser.add_argument(
        "--budget-s", type=float, metavar="S", help="of rounds a block: 20, for quick 3; 5 rounds least"
    )
    parser.add_argument("--peers", default="auto", metavar="auto|none|torch,timm,hf,flax", help="packages to compare")
    parser.add_argument("--dtype", choices=DTYPES, help="of arrays and computation: f32, on a device bf16")
    parser.add_argument("--profile", action="store_true", help="also where the time of ours goes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there too")
    parser.add_argument("--check", action="store_true", help="exit with 1 for a missed goal, with 2 for noise alone")
    return parser.parse_args(argv)


def _default_mode(suite: str) -> str:
    if suite == "quick":
        return "one-core"
    # Another process: jax would keep the accelerator's memory for this one.
    probe = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    if subprocess.run(probe, stdout=subprocess.PIPE, text=True, check=True).stdout.strip() != "cpu":
        return "device"
    return "two-core" if len(_cores()) > 1 else "one-core"


def _threads(mode: str, asked: int | None) -> int:
    available = len(_cores())
    threads = {"one-core": 1, "two-core": asked or 2, "device": asked or available}[mode]
    if mode == "one-core" and asked not in (None, 1):
        raise UsageError(f"--threads {asked} needs --mode two-core: one-core mode has one thread.")
    if not 1 <= threads <= available:
        raise UsageError(
            f"{threads} threads do not fit {available} cores: give --threads {available} or --mode one-core."
        )
    return threads


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def environment(mode: str, threads: int, workload: str = "") -> dict[str, str]:
    """The environment of a child process; on an accelerator, if the workload wants one, jax takes what it needs."""
    if workload in SIMULATED:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={SIMULATED[workload]}"
        return environment("one-core", threads) | {"XLA_FLAGS": flags.strip()}
    if mode == "device":
        # JAX would take three quarters of the memory, and leave torch in the same process the rest.
        return os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # Waiting OpenMP threads spin by default, and would slow down what is timed next.
    settings = MALLOC | {"OMP_WAIT_POLICY": "passive", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    settings |= {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    return os.environ | settings


@contextlib.contextmanager
def _pinned(mode: str, threads: int) -> Iterator[None]:
    """Children that are started meanwhile may use `threads` cores."""
    before = _cores()
    if mode != "device" and sys.platform == "linux":
        os.sched_setaffinity(0, before[:threads])
    try:
        yield
    finally:
        if sys.platform == "linux":
            os.sched_setaffinity(0, before)


def run(
    request: Request, workloads: Sequence[str], path: Path | None = None, sizes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The report, printed block by block and written to `path` after each workload.

    Args:
      request: what all workloads have in common.
      workloads: keys of `WORKLOADS`.
      path: of the JSON file.
      sizes: by workload, keywords of its `cases`; "roofline" has those of `xattn.bench.roofline.measure`.
    """
    sizes = sizes or {}
    with _pinned(request.mode, request.threads):
        clock = {"clock": "process_time" if request.mode == "one-core" else "perf_counter"}
        large = DEVICE_CEILINGS if request.mode == "device" else {}
        first = _child("roofline", json.dumps(clock | large | sizes.get("roofline", {})), request)
        common = {"mode": request.mode, "threads": request.threads}
        report: dict[str, Any] = {"schema": SCHEMA, "env": first["env"] | common, "roofline": first["roofline"]}
        report["workloads"] = []
        print(_rates(first["roofline"]), flush=True)
        for workload in workloads:
            asked = dataclasses.replace(
                request, workload=workload, roofline=first["roofline"], sizes=sizes.get(workload, {})
            )
            try:
                blocks = middle([_child("measure", asked.to_json(), asked) for _ in range(RUNS.get(workload, 1))])
            except subprocess.CalledProcessError as error:
                blocks = [{"id": workload, "error": f"its process ended with {error.returncode}"}]
            for block in blocks:
                print(f"\n{table(block, request.mode)}", flush=True)
            report["workloads"] += blocks
            if path:
                write_atomically(path, json.dumps(report, indent=1))
    return report


def middle(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The blocks of several runs of a workload as those of one: medians of what they measured, and verdicts on them.

    A row that failed in a run has failed, and a goal is noisy if it was so in most runs.
    """
    return [_middle(blocks) for blocks in zip(*runs, strict=True)]


def _middle(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(blocks) == 1:
        return blocks[0]
    rows, goals = [], []
    for same in zip(*(block["rows"] for block in blocks), strict=True):
        failed = [row for row in same if row["status"] != "ok"]
        rows.append(failed[0] if failed else {key: _median([row[key] for row in same]) for key in same[0]})
    for same in zip(*(block["goals"] for block in blocks), strict=True):
        verdicts, value = [goal["verdict"] for goal in same], _median([goal["value"] for goal in same])
        if value is None:
            verdict = "fail" if "fail" in verdicts else "n/a"
        else:
            verdict = "pass" if value <= same[0]["max"] else "fail"
        noisy = 2 * verdicts.count("noisy") > len(same)
        goals.append(same[0] | {"value": value, "verdict": "noisy" if noisy else verdict})
    return blocks[0] | {"rows": rows, "goals": goals, "runs": len(blocks)}


def _median(values: Sequence[Any]) -> Any:
    """Of numbers; else what the first run has, but None if any has none."""
    if None in values:
        return None
    return statistics.median(values) if isinstance(values[0], int | float) else values[0]


def _child(module: str, argument: str, request: Request) -> Any:
    """What the function `child` of a module of this package leaves in a file; what it prints goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        code = f"import sys; from xattn.bench.{module} import child; child(*sys.argv[1:])"
        command = [sys.executable, "-c", code, argument, str(answer)]
        subprocess.run(command, env=environment(request.mode, request.threads, request.workload), stdout=2, check=True)
        return json.loads(answer.read_text())


def exit_code(report: Mapping[str, Any]) -> int:
    """0 if all goals pass or have nothing to be measured against, 1 for a missed one, 2 for noise alone."""
    verdicts = {goal["verdict"] for block in report["workloads"] for goal in block.get("goals", ())}
    if "fail" in verdicts or any("error" in block for block in report["workloads"]):
        return 1
    return 2 if "noisy" in verdicts else 0


def _rates(roofline: Mapping[str, float]) -> str:
    f32, bf16 = (roofline[f"{dtype}_flops"] / 1e9 for dtype in DTYPES)
    return (
        f"this machine: {f32:.0f} GFLOP/s f32, {bf16:.0f} bf16; memory {roofline['bandwidth'] / 1e9:.1f} GB/s; "
        f"{roofline['exps'] / 1e9:.2f} Gexp/s"
    )


def table(block: Mapping[str, Any], mode: str) -> str:
    """A block for people to read: ours first, by ratio, each with its goals."""
    if "error" in block:
        return f"{block['id']}: {block['error']}"
    ratio, time = ("rcpu", "cpu_ms") if mode == "one-core" else ("ratio", "med_ms")
    times = [row for row in block["rows"] if "med_ms" in row]
    work = f"{block['flops'] / 1e9:.2f} GFLOP  " if block["flops"] else ""
    floor = f"floor {block['floor_ms']:.3g} ms  " if block["floor_ms"] else ""
    runs = f"{block['runs']} runs of " if "runs" in block else ""
    rounds = (
        f"{mode}, {runs}{times[0]['rounds']} rounds, foreign {100 * times[0]['foreign_load']:.0f} %" if times else mode
    )
    counted = any("sent_mb" in row for row in block["rows"])
    titles = f"{'name':<30}{'kind':<11}"
    if counted:
        rounds = "counted, not timed"
        titles += f"{'sent MB':<10}{'collectives':<13}{'of formula':<12}"
    else:
        titles += f"{'ratio':<7}{'[q1, q3]':<15}{'of floor':<10}{time.replace('_', ' '):<10}{'peak MB':<9}"
    titles += f"{'temp MB':<9}{'compile s':<11}{'err':<9}goal"
    lines = [f"{block['id']} {block['title']}  {block['dtype']}  {block['shape']}  {work}{floor}{rounds}", titles]
    order = "sent_mb" if counted else ratio
    for row in sorted(block["rows"], key=lambda row: (row["kind"] != "ours", row.get(order, 1e9))):
        cells = f"{row['name']:<30}{row['kind']:<11}"
        if row["status"] != "ok":
            cells += f"{row['status']}" + (f", error {row['max_err']:.1e}" if row["status"] == "mismatch" else "")
        else:
            if counted:
                cells += f"{row['sent_mb']:<10.3f}{row['collectives']:<13}"
                cells += _cell(row.get("of_formula"), ".3f", 12)
            else:
                cells += f"{row[ratio]:<7.3f}" + "[{q1:.2f}, {q3:.2f}]".format_map(row).ljust(15)
                cells += _cell(row.get("frac_of_floor"), ".2f", 10) + _cell(row[time], ".4g", 10)
                cells += _cell(row.get("peak_mb"), ".0f", 9)
            cells += _cell(row.get("temp_mb"), ".0f", 9)
            cells += _cell(row.get("compile_s"), ".1f", 11) + _cell(row.get("max_err"), ".0e", 9)
            cells += "baseline" if row["name"] == block["baseline"] and not counted else ""
        lines.append(cells.rstrip())
        for goal in block["goals"]:
            if goal["row"] == row["name"]:
                lines.append(f"    {_goal(goal)}")
    for row in block["rows"]:
        if profile := row.get("profile"):
            lines.append(f"  where the time of {row['name']} goes (one call, wall clock):")
            lines += [f"  {part['share']:>6.1%} {part['ms']:>9.2f} ms  {part['what']}" for part in profile]
    return "\n".join(lines)


def _cell(value: float | None, form: str, width: int) -> str:
    return f"{'' if value is None else format(value, form):<{width}}"


def _goal(goal: Mapping[str, Any]) -> str:
    value = "" if goal["value"] is None else f"{goal['value']:.3f} "
    against = f" x {goal['vs']}" if goal["vs"] else ""
    return f"{goal['metric']} {value}<= {goal['max']:.3f}{against}: {goal['verdict'].upper()}"
