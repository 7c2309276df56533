"""Kills a training run with SIGKILL at random moments and checks that nothing is lost or changed.

    python tests/train/drill.py --runs=20

Each run is started as a user would start it, killed at a random moment (every third one in the middle of a save), and
started again with the same command. Its losses, its parameters and its evaluation must equal, bit for bit, those of a
run that nobody touched.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(workdir: Path, config: str) -> subprocess.Popen:
    """Starts the training in the background; its output goes to a log beside the workdir."""
    command = (sys.executable, "-m", "xattn", "train", f"--config={config}", "--config.num_steps=12")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        return subprocess.Popen([*command, f"--workdir={workdir}"], stdout=log, stderr=log, env=environment)


def finish(workdir: Path, config: str) -> float:
    """Runs the training to its end; returns the seconds it took."""
    began = time.monotonic()
    if code := start(workdir, config).wait():
        log = (workdir.parent / f"{workdir.name}.log").read_text()
        raise AssertionError(f"the run in {workdir} ended with {code}:\n{log[-3000:]}")
    return time.monotonic() - began


def contents(workdir: Path) -> dict[str, object]:
    """What must not depend on interruptions: rows of metrics, the evaluation, checksums of every array."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluation = {path.name: json.loads(path.read_text()) for path in workdir.glob("evals/*/*.json")}
    last = max(workdir.glob("checkpoints/[0-9]*"), key=lambda path: int(path.name))
    meta = json.loads((last / "meta" / "metadata").read_text())
    return {"rows": rows, "evaluation": evaluation, "step": last.name, "checksums": meta["checksums"]}


def drill(runs: int, folder: Path, config: str = "qsformer/glyphs:smoke", seed: int = 0) -> None:
    """Kills and continues `runs` runs in `folder`; AssertionError if one differs from the untouched run."""
    rng = random.Random(seed)
    finish(folder / "warm_up", config)  # fills the compilation cache: the next run takes as long as those to be killed
    seconds = finish(folder / "untouched", config)
    expected = contents(folder / "untouched")
    for number in range(runs):
        workdir = folder / f"run_{number}"
        process = start(workdir, config)
        if number % 3 == 2:
            nth = rng.randrange(1, 4)
            while process.poll() is None and not _saving(workdir, nth):
                _wait(process, 0.001)
        else:
            _wait(process, rng.uniform(0, 1) * seconds)
        finished = process.poll() is not None
        process.kill()
        process.wait()
        state = "had finished" if finished else f"killed, {_progress(workdir)}"
        finish(workdir, config)
        found = contents(workdir)
        wrong = [name for name in expected if found[name] != expected[name]]
        assert not wrong, f"run {number}, {state}: {', '.join(wrong)} differ from the untouched run's"
        print(f"run {number}: {state}; continued: equal to the untouched run", flush=True)


def _wait(process: subprocess.Popen, seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _saving(workdir: Path, nth: int) -> bool:
    """Whether the run is in the middle of a save, with `nth` - 1 or more checkpoints done."""
    folders = [path.name for path in workdir.glob("checkpoints/*")]
    return len(folders) >= min(nth, 3) and any("tmp" in name for name in folders)


def _progress(workdir: Path) -> str:
    folders = [path.name for path in workdir.glob("checkpoints/*")]
    saved = sorted(int(name) for name in folders if name.isdigit())
    saving = ", in the middle of a save" if any("tmp" in name for name in folders) else ""
    return f"steps {saved} saved{saving}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        drill(arguments.runs, Path(temporary), seed=arguments.seed)
    print(f"{arguments.runs} runs, all equal to the untouched one, bit for bit")
