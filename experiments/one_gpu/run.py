"""The smoke runs of three models in bfloat16 on the accelerator of this machine.

    python experiments/one_gpu/run.py [CONFIG ...]

Each is 200 steps of `xattn train` in a process of its own. The models are tiny, so that the rate is that of the loop
and of the data. Prints a table and says on what.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIGS = ("qsformer/glyphs:smoke", "perceiver_io/imagenet_fourier:smoke", "crossvit/imagenet:smoke")
NUM_STEPS = 200


def measure(config: str, workdir: Path) -> dict[str, str]:
    """A row of the table.

    Raises:
      RuntimeError: if the run fails, with the end of what it printed.
    """
    command = [sys.executable, "-m", "xattn", "train", f"--config={config}", f"--workdir={workdir}"]
    keys = {"dtype": "bfloat16", "num_steps": NUM_STEPS, "log_every": 10}
    keys |= {"checkpoint.every": NUM_STEPS, "validation.every": NUM_STEPS}
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{config} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    rates = [float(rate) for rate in re.findall(r"([\d.]+) steps/s", done.stdout)]
    examples = [float(rate) for rate in re.findall(r"([\d.]+) examples/s", done.stdout)]
    peak = re.search(r"peak memory of a device: ([\d,]+) MiB", done.stdout)
    ready = re.search(r"ready for the first step after ([\d.]+) s", done.stdout)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    if skipped := max(row.get("skipped", 0) for row in rows):
        raise RuntimeError(f"{config}: {skipped:.0f} updates were not finite and left out.")
    half = len(rates) // 2  # the first ones are with the start
    return {
        "run": f"`{config}`",
        "ready after s": ready[1] if ready else "-",
        "steps/s": f"{statistics.median(rates[half:]):.1f}",
        "examples/s": f"{statistics.median(examples[half:]):.1f}",
        "peak MiB": peak[1] if peak else "-",
        "loss, first and last row": f"{losses[0]:.3f}, {losses[-1]:.3f}",
        "whole command s": f"{time.perf_counter() - began:.0f}",
    }


def main(configs: list[str]) -> None:
    """Prints what the device is, then the rows as they end."""
    probe = "import jax; print(jax.__version__, jax.devices()[0].device_kind, sep=', ')"
    told = subprocess.run([sys.executable, "-c", probe], stdout=subprocess.PIPE, text=True, check=True)
    print(f"jax {told.stdout.strip()}, Python {sys.version.split()[0]}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, config in enumerate(configs or CONFIGS):
            row = measure(config, Path(folder) / str(number))
            if number == 0:
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(row.values())} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
