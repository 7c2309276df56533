"""Times the programs of a workload by turns in one process, after it has seen that they agree.

A round calls every program once, in an order drawn anew, with a pause of 4 ms before each and the garbage collector
off. What is compared are the times of one round, so that a machine that gets slower or is shared slows all of them.
"""

import atexit
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xattn.bench import WORKLOADS, Request
from xattn.bench.goals import ENOUGH, GOALS, Goal, Round, statistics, usable, verdict
from xattn.bench.profile import profile
from xattn.ops.products import BFLOAT16
from xattn.train.optim import make_optimizer
from xattn.train.state import TrainState
from xattn.train.step import make_train_step

PAUSE_S = 0.004
DEVICE_CALLS = 20
"""Calls in one sample on an accelerator, with one wait at their end: a single one is shorter than its launch."""
TOLERANCE = {"f32": 2e-5, "bf16": 2e-2}
"""Largest difference from the reference row, relative to the largest value of the array."""


class Program(NamedTuple):
    """Something to time.

    Attributes:
      run: starts one call and returns its outputs.
      wait: returns its argument, outputs of `run`, once they are computed.
      view: outputs to the arrays that must agree with the other rows', in their layout.
      sample: (wall seconds, CPU seconds) of one measurement, for what is no call in this process.
      compile_s: seconds of compilation.
      temp_mb: temporary memory that the compiled program asks for, in MB.
      extra: more keys of the row's result, known when the rounds are over.
      hlo: the compiled program's text.
    """

    run: Callable[[], Any] | None = None
    view: Callable[[Any], Any] = lambda outputs: outputs
    sample: Callable[[], tuple[float, float]] | None = None
    compile_s: float | None = None
    temp_mb: float | None = None
    extra: Callable[[], dict[str, Any]] = dict
    hlo: str = ""
    wait: Callable[[Any], Any] = jax.block_until_ready


class Work(NamedTuple):
    """The least that a task needs: FLOPs (2 a multiply-add), exponentials, bytes moved."""

    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      name: of the row.
      kind: "ours"; "reference" for what needs no more than jax and flax; "peer".
      make: builds the program; an ImportError makes the row absent.
      package: of a peer, one of `PEERS`.
      group: rows with one name of a group must agree; None agrees with nothing.
      tolerance: if that of the request's dtype, in `TOLERANCE`, is too small.
      dtype: of matrix products, instead of the request's; where that is the same, the row is left out.
      work: instead of the block's, for another way to do the task.
    """

    name: str
    kind: str
    make: Callable[[], Program]
    package: str = ""
    group: str | None = ""
    tolerance: float = 0.0
    dtype: str | None = None
    work: Work | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A block of the table: programs for one task.

    Attributes:
      title: of the block.
      shape: sizes, to be read.
      rows: ours first.
      baseline: names of rows in the order in which they are preferred as ratio 1.
      work: of the task.
      timed: whether there are rounds; without, a row has what its program's `extra` tells.
      memory: whether peak memory is measured too, in a fresh process for each row; of ours alone in the quick suite.
      goals: besides those of `GOALS`.
    """

    title: str
    shape: str
    rows: Sequence[Row]
    baseline: Sequence[str]
    work: Work = Work()
    timed: bool = True
    memory: bool = False
    goals: Sequence[Goal] = ()


def compiled(function: Callable[..., Any], *arguments: Any, donate: Sequence[int] = ()) -> tuple[Any, dict[str, Any]]:
    """The compiled function of arguments like these, and what a `Program` tells of it."""
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    began = time.perf_counter()
    program = lowered.compile()
    seconds, memory = time.perf_counter() - began, program.memory_analysis()
    temp_mb = memory.temp_size_in_bytes / 1e6 if memory else 0.0
    return program, {"compile_s": seconds, "temp_mb": temp_mb, "hlo": program.as_text()}


def jitted(function: Callable[..., Any], *arguments: Any, view: Callable[[Any], Any] = lambda x: x) -> Program:
    """The program `function(*arguments)`, compiled."""
    program, told = compiled(function, *arguments)
    return Program(lambda: program(*arguments), view, **told)


def rounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with products of bfloat16 that are summed in float32."""

    def run(*arguments: Any) -> Any:
        with jax.default_matmul_precision(BFLOAT16):
            return function(*arguments)

    return run


def training(
    model: Any, task: Any, optimizer: Mapping[str, Any], variables: Mapping[str, Any], batch: Mapping[str, Any]
) -> Program:
    """The step that `xattn train` compiles; each call goes on from the state of the last, and its output is the loss.

    Args:
      model, task: see `xattn.models` and `xattn.tasks`.
      optimizer: config of `xattn.train.optim.make_optimizer`.
      variables: at the start.
      batch: the same in every step.
    """
    rule, schedule = make_optimizer(optimizer, num_steps=1000)
    params, others = variables["params"], {key: x for key, x in variables.items() if key != "params"}
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, others, rule.init(params), {}, zero, zero)
    # The step takes the state's memory, and other rows start from the same arrays.
    state, batch = jax.tree.map(jnp.copy, state), jax.tree.map(jnp.asarray, dict(batch))
    step, key = make_train_step(model, task, rule, schedule), jax.random.key(0)
    program, told = compiled(step, state, batch, key, donate=(0,))

    def run() -> Any:
        nonlocal state
        state, metrics = program(state, batch, key)
        return metrics["loss"]

    return Program(run, **told)


def scratch_folder() -> Path:
    """A new folder, which is gone when this process ends."""
    folder = tempfile.mkdtemp(prefix="xattn_bench_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_seconds() -> tuple[float, float]:
    """What all processes have computed so far on this process's cores, and what it has with its finished children.

    Where the first is not told, it is the second.
    """
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time() + children.ru_utime + children.ru_stime
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
        ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = 0
        for name, *counts in lines:
            user, nice, system, _idle, _iowait, *others = map(int, counts[:8])
            ticks += user + nice + system + sum(others) if name in ours else 0
    except (OSError, ValueError, AttributeError):
        return own, own
    return ticks / os.sysconf("SC_CLK_TCK"), own


def alternate(samples: Mapping[str, Callable[[], tuple[float, float]]], budget_s: float, seed: int = 0) -> list[Round]:
    """Rounds of all samples until `budget_s` is over, at least `ENOUGH`."""
    shuffle, rounds = random.Random(seed), []
    gc.disable()
    began = time.perf_counter()
    try:
        while len(rounds) < ENOUGH or time.perf_counter() - began < budget_s:
            start, before, times = time.perf_counter(), cpu_seconds(), {}
            for name in shuffle.sample(list(samples), len(samples)):
                time.sleep(PAUSE_S)
                times[name] = samples[name]()
            busy, own = np.subtract(cpu_seconds(), before)
            rounds.append(Round(times, max(0.0, float(busy - own) / (time.perf_counter() - start) / cores())))
    finally:
        gc.enable()
    return rounds


def run_case(case: Case, request: Request) -> dict[str, Any]:
    """A block of the report: builds the rows, compares them, times those that agree."""
    found: dict[str, dict[str, Any]] = {}
    programs: dict[str, Program] = {}
    rows = [row for row in case.rows if row.dtype != request.dtype]
    for row in rows:
        if row.kind == "peer" and request.peers is not None and row.package not in request.peers:
            continue
        found[row.name] = {"name": row.name, "kind": row.kind, "dtype": row.dtype or request.dtype, "status": "ok"}
        with _statuses(found[row.name]):
            programs[row.name] = row.make()
    _agree([row for row in rows if row.name in programs], programs, found, request)
    ok = [name for name, result in found.items() if result["status"] == "ok"]

    calls = DEVICE_CALLS if request.mode == "device" else 1
    samples = {name: programs[name].sample or _timed(programs[name], calls) for name in ok}
    rounds = alternate(samples, request.budget_s) if ok and case.timed else []
    used, _ = usable(rounds, request.mode)
    works = {row.name: row.work for row in rows}
    baseline = next((name for name in case.baseline if name in ok), ok[0] if ok else None)
    foreign = float(np.median([each.foreign for each in used])) if used else 0.0
    for name in ok:
        program, result = programs[name], {}
        if case.timed:
            work = works[name] or case.work
            floor_ms = floor(work, found[name]["dtype"], request.roofline, request.mode)
            result = statistics(used, name, baseline or name, request.mode)
            spent = result["cpu_ms" if request.mode == "one-core" else "med_ms"]
            result |= {"gflops": work.flops / spent / 1e6} if work.flops else {}
            result |= {"frac_of_floor": floor_ms / spent, "over_floor": spent / floor_ms} if floor_ms else {}
            result |= {"rounds": len(used), "foreign_load": foreign}
        result |= {"compile_s": program.compile_s, "temp_mb": program.temp_mb, **program.extra()}
        if case.memory and (request.suite == "full" or found[name]["kind"] == "ours"):
            result["peak_mb"] = peak_mb(request, case.title, name)
        if request.profile and found[name]["kind"] == "ours" and program.run and program.hlo:
            result["profile"] = profile(program.run, program.hlo)
        found[name] |= result
    on = "device" if request.mode == "device" else "cpu"
    goals = [*case.goals]
    goals += [goal for goal in GOALS if (goal.workload, goal.case, goal.on) == (request.workload, case.title, on)]
    goals = goals if request.dtype == "f32" or on == "device" else []
    return {
        "id": request.workload,
        "title": case.title,
        "shape": case.shape,
        "dtype": request.dtype,
        **case.work._asdict(),
        "floor_ms": floor(case.work, request.dtype, request.roofline, request.mode),
        "baseline": baseline,
        "rows": list(found.values()),
        "goals": [verdict(goal, found, rounds, request.mode, request.threads) for goal in goals],
    }


def floor(work: Work, dtype: str, roofline: Mapping[str, Any], mode: str) -> float | None:
    """Milliseconds that the task takes at the machine's rates: max(FLOPs / rate + exps / rate, bytes / bandwidth).

    An accelerator has other units for products than for exp, so that the largest of the three counts.
    """
    if not (work.flops and roofline):
        return None
    products, exps = work.flops / roofline[f"{dtype}_flops"], work.exps / roofline["exps"]
    compute = max(products, exps) if mode == "device" else products + exps
    return 1e3 * max(compute, work.bytes / roofline["bandwidth"])


@contextlib.contextmanager
def _statuses(result: dict[str, Any]) -> Any:
    """Turns the errors that a row may have into its status."""
    try:
        yield
    except ImportError as error:
        result |= {"status": "absent", "why": str(error)}
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        result |= {"status": "oom", "why": str(error)[:200]}


def _agree(rows: Sequence[Row], programs: dict[str, Program], found: dict[str, Any], request: Request) -> None:
    """Warms each program up by two calls, and marks those that differ from the first reference of their group."""
    first: dict[str, Any] = {}
    for row in sorted(rows, key=lambda row: row.kind != "reference"):
        program, result = programs[row.name], found[row.name]
        if program.run is None:
            continue
        with _statuses(result):
            outputs = program.view([program.wait(program.run()) for _ in range(2)])
            if row.group is None:
                continue
            arrays = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(outputs)]
            expected = first.setdefault(row.group, arrays)
            if expected is arrays:
                continue
            result["max_err"] = difference(arrays, expected)
            if not result["max_err"] <= max(row.tolerance, TOLERANCE[request.dtype]):
                result["status"] = "mismatch"


def difference(arrays: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Largest difference relative to the largest value, of the array where it is worst; infinite for other shapes."""
    if [x.shape for x in arrays] != [x.shape for x in expected]:
        return float("inf")
    # NumPy's maximum, because Python's passes over NaN.
    return float(np.max([np.abs(x - y).max() / np.abs(y).max() for x, y in zip(arrays, expected, strict=True)]))


def _timed(program: Program, calls: int) -> Callable[[], tuple[float, float]]:
    def sample() -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        outputs = None
        for _ in range(calls):
            outputs = program.run()  # pyright: ignore[reportOptionalCall]
        program.wait(outputs)
        return (time.perf_counter() - began) / calls, (time.process_time() - cpu) / calls

    return sample


def peak_mb(request: Request, title: str, name: str) -> float | None:
    """MB of memory that a warm call of a row adds, in a fresh process with the default allocator."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    code = "import sys; from xattn.bench import measure; measure.print_peak(*sys.argv[1:])"
    command = [sys.executable, "-c", code, request.to_json(), title, name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(request: str, title: str, name: str) -> None:
    """Prints how far the resident memory rises in the second call of a row, in MB."""
    case = next(case for case in _cases(Request(**json.loads(request))) if case.title == title)
    run = next(row for row in case.rows if row.name == name).make().run
    assert run is not None
    print(rise_mb(run))


def rise_mb(run: Callable[[], Any]) -> float:
    """How far the resident memory rises in the second call of `run`, in MB."""
    jax.block_until_ready(run())
    gc.collect()
    before = _status_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    jax.block_until_ready(run())
    return (_status_kb("VmHWM") - before) / 1e3


def _status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _cases(request: Request) -> Sequence[Case]:
    return importlib.import_module(WORKLOADS[request.workload]).cases(request, **request.sizes)


def child(request: str, path: str) -> None:
    """What a child process does: measures what `request` (JSON) asks for and writes the blocks to `path`."""
    asked = Request(**json.loads(request))
    Path(path).write_text(json.dumps([run_case(case, asked) for case in _cases(asked)]))
