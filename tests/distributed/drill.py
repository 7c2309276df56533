"""Breaks runs in every way that machines do, and checks that nothing is lost or changed.

    make drill                                             all rows, as a table
    python -m tests.distributed.drill --only=kill --count=5

Most rows break runs that were started as a user would start them, check that they end as docs/scaling.md promises,
start them again with the same command, and compare them with a run that nobody touched: losses, evaluation and every
array, bit for bit. "damage" does it to checkpoints without a run; "restore" compares arrays and examples, since sums
over other devices are rounded otherwise; "two runs" sees to it that the first one goes on.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import SingleDeviceSharding

from tests.distributed import launch
from tests.distributed.restore import LAYOUTS, restore_pairs
from tests.test_fuzz import fuzz
from xattn.checkpoints import Checkpoints
from xattn.cli import main as xattn

CONFIG = ("config=protonet/glyphs:smoke", "config.pipeline.batch_size=2", "config.preempt_exit_code=75")
BOUNDED = 90  # seconds in which a run must end of which a process is dead or stuck: its heartbeat times out after 10

OUTPUT = tempfile.TemporaryDirectory(prefix="drill_")  # of what the processes print


# Starting runs, and what they leave.


def verb(*words: str) -> None:
    """One process of several: `xattn` with the given words, their dashes left out."""
    sys.exit(xattn([words[0], *(f"--{word}" for word in words[1:])]))


def start(workdir: Path, steps: int, *flags: str, processes: int = 1, limit: int | None = None) -> list[launch.Process]:
    """Starts to train for `steps` steps.

    Args:
      workdir: of the run.
      steps: where the run ends.
      flags: further ones, without their dashes.
      processes: how many, with a device each.
      limit: no process can write files larger than these bytes.
    """
    words = ["train", *CONFIG, f"config.num_steps={steps}", f"config.mesh.data={processes}", f"workdir={workdir}"]
    folder = Path(tempfile.mkdtemp(dir=OUTPUT.name))
    if processes > 1:
        program = "tests.distributed.drill:verb"
        return launch.start(program, *words, *flags, folder=folder, num_processes=processes, num_devices=1)
    output = folder / "process_0.txt"
    with output.open("w") as log:
        popen = subprocess.Popen(
            [sys.executable, "-m", "xattn", words[0], *(f"--{word}" for word in (*words[1:], *flags))],
            stdout=log,
            stderr=log,
            env=launch.environment(num_devices=1),
            cwd=launch.ROOT,
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
        )
    return [launch.Process(popen, output)]


def finish(workdir: Path, steps: int, *flags: str, processes: int = 1) -> float:
    """Trains to the end; returns the seconds it took."""
    began = time.monotonic()
    running = start(workdir, steps, *flags, processes=processes)
    codes = launch.finish(running, timeout=300)
    assert not any(codes), f"{workdir} ended with {codes}:\n{said(running)}"
    return time.monotonic() - began


def said(running: Sequence[launch.Process]) -> str:
    return "\n".join(process.printed()[-3000:] for process in running)


def await_(condition: Callable[[], object], running: Sequence[launch.Process], seconds: float = 120) -> None:
    """Waits until `condition` holds or a process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and all(process.popen.poll() is None for process in running):
        assert time.monotonic() < deadline, f"nothing happened in {seconds} s:\n{said(running)}"
        time.sleep(0.002)


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def contents(workdir: Path) -> dict[str, Any]:
    """What must not depend on interruptions: rows of metrics, the evaluation, checksums of every array."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluation = {str(path.relative_to(workdir)): path.read_text() for path in workdir.glob("evals/*/*.json")}
    step = checkpoints(workdir)[-1]
    meta = json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return {"rows": rows, "evaluation": evaluation, "step": step, "checksums": meta["checksums"]}


def assert_untouched(workdir: Path, untouched: Path, what: str) -> None:
    expected, found = contents(untouched), contents(workdir)
    found["evaluation"] = {
        path: found["evaluation"].get(path) for path in expected["evaluation"]
    }  # it may have ended before
    wrong = [name for name in expected if found[name] != expected[name]]
    assert not wrong, f"{what}: {', '.join(wrong)} differ from the untouched run's"


# The rows: each breaks `count` runs in `folder`, and returns what was seen.


def kill(folder: Path, count: int, seed: int = 0) -> str:
    """SIGKILL at random moments, or while saving. Of more than 5 runs a third has two processes: one or both die."""
    rng = random.Random(seed)
    several = count > 5
    steps, seconds, seen = 12, {}, {"while saving": 0, "of two processes one": 0, "of two processes both": 0}
    for processes in (1, 2)[: 1 + several]:
        finish(folder / f"warm_up_{processes}", steps, processes=processes)  # fills the cache of compiled programs
        seconds[processes] = finish(folder / f"untouched_{processes}", steps, processes=processes)
    for number in range(count):
        processes = 2 if several and number % 3 == 1 else 1
        workdir = folder / f"run_{number}"
        running = start(workdir, steps, processes=processes)
        if number % 9 in (2, 4, 5, 8):
            nth = rng.randrange(1, 4)
            await_(lambda: saving(workdir) and len(checkpoints(workdir)) >= min(nth, 3) - 1, running)  # noqa: B023
            seen["while saving"] += saving(workdir)
        else:
            moment = time.monotonic() + rng.uniform(0, 0.9) * seconds[processes]
            await_(lambda: time.monotonic() > moment, running)  # noqa: B023
        victims = running if number % 2 else [rng.choice(running)]
        if processes == 2:
            seen[f"of two processes {'both' if len(victims) == 2 else 'one'}"] += 1
        for process in victims:
            process.popen.kill()
        codes = launch.finish(running, BOUNDED)
        assert all(codes[running.index(victim)] == -signal.SIGKILL for victim in victims), f"codes {codes}: none killed"
        finish(workdir, steps, processes=processes)
        assert_untouched(workdir, folder / f"untouched_{processes}", f"run {number}, killed")
        shutil.rmtree(workdir)
    assert seen["while saving"] >= count // 9, f"{seen}: too few were saving"
    return f"{count} killed ({', '.join(f'{number} {what}' for what, number in seen.items())}), continued bit for bit"


def saving(workdir: Path) -> bool:
    return any("tmp" in path.name for path in workdir.glob("checkpoints/*"))


def damage(folder: Path, count: int) -> str:
    """Every file of a checkpoint truncated, one byte of it flipped, deleted: `count` of these cases, evenly spread."""
    place = SingleDeviceSharding(jax.devices()[0])

    def items(step: int) -> tuple[dict, dict]:
        rng = np.random.default_rng(step)
        params = {name: jnp.asarray(rng.normal(size=(64, 32)), jnp.float32) for name in ("a", "b")}
        return {"params": params, "model_state": {}, "ema": {}}, {"opt_state": params, "step": jnp.int32(step)}

    def bits(trees: object) -> list[bytes]:
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trees)]

    logging.set_verbosity(logging.FATAL)  # what is damaged is asserted below
    # Orbax leaves behind reads that failed.
    sys.unraisablehook = lambda _: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")

    good = folder / "good"
    written = Checkpoints(good)
    for step in (1, 2):
        written.save(step, *items(step), {})
    written.close()
    asked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), items(0))
    files = sorted(path.relative_to(good) for path in (good / "checkpoints" / "2").rglob("*") if path.is_file())
    cases = [(file, damage) for file in files for damage in (_truncate, _flip, Path.unlink)]
    outcomes = {1: 0, 2: 0}
    chosen = cases[:: max(1, len(cases) // count)]
    for number, (file, damage) in enumerate(chosen):
        workdir = folder / str(number)
        shutil.copytree(good, workdir)
        damage(workdir / file)
        again = Checkpoints(workdir)
        restored = again.restore_latest(*asked)
        assert restored is not None
        step, *trees = restored
        assert bits(trees) == bits(items(step)), f"{file}, {damage.__name__}: step {step} is not what was saved"
        outcomes[step] += 1
        again.save(3, *items(3), {})
        again.close()
        assert again.steps()[-1] == 3
        shutil.rmtree(workdir)
    assert all(outcomes.values()), f"{outcomes}: some damage must be harmful, and some must not"
    return f"{len(chosen)} of {len(cases)} cases: {outcomes[2]} times identical, {outcomes[1]} times the one before"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def sigterm(folder: Path, count: int) -> str:
    """SIGTERM to a run, and to one of two processes: all save at the same step and end with the config's code."""
    stopped = []
    for number in range(count):
        processes = 2 if number % 2 == 0 else 1
        workdir = folder / f"run_{number}"
        running = start(workdir, ENDLESS, *UNTIMED, processes=processes)
        await_(lambda: rows(workdir) > 2, running)  # noqa: B023
        running[-1 - number // 2 % processes].popen.send_signal(signal.SIGTERM)
        codes = launch.finish(running, BOUNDED)
        assert set(codes) == {75}, f"codes {codes}:\n{said(running)}"
        (step,) = checkpoints(workdir)
        for process in running:
            assert f"stopped at step {step};" in process.printed(), process.printed()
        assert_continues(workdir, UNTIMED, processes)
        stopped.append(f"{processes} process{'es' * (processes > 1)} at step {step}")
    return f"code 75, saved and continued bit for bit: {', '.join(stopped)}"


ENDLESS = 100_000  # steps
# Nothing that a step does depends on how many there are, nor is anything but the end evaluated.
UNTIMED = (
    "config.optimizer.schedule.name=constant",
    f"config.checkpoint.every={ENDLESS}",
    f"config.validation.every={ENDLESS}",
)


def assert_continues(workdir: Path, flags: Sequence[str], processes: int) -> None:
    """Three steps more, and as many in a run of its own: the same."""
    steps, untouched = checkpoints(workdir)[-1] + 3, workdir.with_name(f"{workdir.name}_untouched")
    for place in (workdir, untouched):
        finish(place, steps, *flags, processes=processes)
    assert_untouched(workdir, untouched, f"continued up to step {steps}")


def rows(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def stuck(folder: Path, count: int) -> str:
    """SIGSTOP to one of two processes: the other one ends with an error within `BOUNDED` seconds."""
    ended, flags = [], (*UNTIMED, "config.checkpoint.every=2")
    for number in range(count):
        workdir = folder / f"run_{number}"
        running = start(workdir, ENDLESS, *flags, processes=2)
        await_(lambda: checkpoints(workdir), running)  # noqa: B023
        stopped, other = running if number % 2 else running[::-1]
        stopped.popen.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            (code,) = launch.finish([other], BOUNDED)
        finally:
            stopped.popen.kill()
            stopped.popen.wait()
        assert code != 0, other.printed()
        ended.append(f"code {code} after {time.monotonic() - began:.0f} s")
        assert_continues(workdir, flags, processes=2)
    return f"the other one ended with {', '.join(ended)}; continued bit for bit"


def full_disk(folder: Path, count: int) -> str:
    """A disk without room, where one can be mounted, and files that may not grow: one sentence, and what was saved."""
    wide = (
        "config.model.encoder.widths=32,32,32,32",  # so that the arrays are larger than what a run writes besides
        UNTIMED[0],
    )
    untouched = folder / "untouched"
    finish(untouched, 12, *wide)
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        for number in range(count):
            on_disk = mounted and number % 2 == 0
            workdir = (disk if on_disk else folder) / f"run_{number}"
            finish(workdir, 4, *wide)
            before = checkpoints(workdir)
            if on_disk:
                free = shutil.disk_usage(disk).free
                (disk / "fill").write_bytes(bytes(max(0, free - 50_000 * number)))
            running = start(workdir, 12, *wide, limit=None if on_disk else 24_000)
            assert launch.finish(running, BOUNDED) == [2], said(running)
            assert running[0].printed().count("can't be written to") == 1, said(running)
            # TensorStore may print tracebacks of writes that failed besides; none of them is of our code.
            assert running[0].printed().splitlines()[-1].startswith("xattn train: "), said(running)
            assert "xattn/" not in running[0].printed(), said(running)
            assert set(checkpoints(workdir)) >= set(before[-1:])
            (disk / "fill").unlink(missing_ok=True)
            finish(workdir, 12, *wide)
            assert_untouched(workdir, untouched, "after a full disk")
            shutil.rmtree(workdir)
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)
    kinds = "a full tmpfs and a limit of file sizes" if mounted else "a limit of file sizes (no tmpfs can be mounted)"
    return f"{count} times ({kinds}) code 2 and one sentence; continued bit for bit"


def two_runs(folder: Path, count: int) -> str:
    """A second run in a workdir is refused until the first one is dead, also by SIGKILL."""
    for number in range(count):
        workdir = folder / f"run_{number}"
        first = start(workdir, ENDLESS)
        try:
            await_(lambda: checkpoints(workdir), first)  # noqa: B023
            second = start(workdir, ENDLESS + 1)
            assert launch.finish(second, BOUNDED) == [2], said(second)
            assert f"in use by another run (process {first[0].popen.pid} on" in second[0].printed()
            assert json.loads((workdir / "config.json").read_text())["num_steps"] == ENDLESS
            assert first[0].popen.poll() is None
        finally:
            first[0].popen.kill()
            first[0].popen.wait()
        finish(workdir, checkpoints(workdir)[-1] + 1)
    return f"{count} times code 2 and one sentence; the first went on, and its SIGKILL freed the workdir"


def restore(folder: Path, count: int) -> str:
    """Saved on one layout of devices and processes, continued on another: `count` of the 12 pairs."""
    names = [*LAYOUTS]
    pairs = [(a, names[(i + shift) % len(names)]) for shift in range(1, len(names)) for i, a in enumerate(names)]
    restore_pairs(folder, pairs[:count])
    return f"{len(pairs[:count])} pairs: every array bit for bit, every example once"


def fuzzed(folder: Path, count: int) -> str:
    """Configs and split files with mistakes in them: a model that is built, or one sentence."""
    return fuzz(folder, count)


ROWS = {
    "kill": (kill, 30),
    "damage": (damage, 1000),
    "sigterm": (sigterm, 3),
    "stuck": (stuck, 2),
    "full disk": (full_disk, 4),
    "two runs": (two_runs, 2),
    "restore": (restore, 12),
    "fuzz": (fuzzed, 1000),
}


def drill(only: str | None = None, count: int | None = None) -> bool:
    """Prints a line for each row; whether all ended as promised."""
    good = True
    for name, (row, usual) in ROWS.items():
        if only in (None, name):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    seen = row(Path(folder), count or usual)
                except Exception:
                    traceback.print_exc()
                    good, seen = False, "NOT AS PROMISED, see above"
            print(f"{name:<10} {time.monotonic() - began:5.0f} s  {seen}", flush=True)
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS, help="one row")
    parser.add_argument("--count", type=int, help="how many cases of it")
    arguments = parser.parse_args()
    sys.exit(0 if drill(arguments.only, arguments.count) else 1)
