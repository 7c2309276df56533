"""W7b: seconds from the start of a process to the end of the first training step, of a ViT-Ti-like model with AdamW.

12 blocks of 192 with 3 heads, in a Python loop or as one `nn.scan`; with an empty compilation cache, or one that an
earlier process has filled. Every sample is a new process; its time counts the imports too.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from xattn.bench import Request
from xattn.bench.measure import Case, Program, Row, scratch_folder


def cases(request: Request, depth: int = 12, width: int = 192, batch: int = 8, tokens: int = 196) -> list[Case]:
    """The block."""
    folder = scratch_folder()

    def row(name: str, kind: str) -> Row:
        model = {"depth": depth, "num_heads": 3, "shape": (batch, tokens, width), "scan": name.startswith("scan")}
        filled = folder / name.partition(",")[0] if name.endswith("cached") else None
        recompiled = []

        def sample() -> tuple[float, float]:
            with tempfile.TemporaryDirectory() as empty:
                found = _start(model, filled or Path(empty))
            recompiled.append(found["recompiled"])
            return found["wall"], found["cpu"]

        def make() -> Program:
            if filled:
                _start(model, filled)
            return Program(sample=sample, extra=lambda: {"recompiled": max(recompiled)} if filled else {})

        return Row(name, kind, make)

    # Ours is the scan; both stand on our layers.
    rows = [
        row("scan", "ours"),
        row("scan, cached", "ours"),
        row("loop", "reference"),
        row("loop, cached", "reference"),
    ]
    return [Case("first step", f"{depth} layers of {width}, B{batch} {tokens} tokens", rows, ("loop",))]


def _start(model: dict[str, Any], cache: Path) -> dict[str, float]:
    began = time.time()
    command = [sys.executable, "-m", "xattn.bench.first_step", json.dumps(model), str(cache)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"wall": found["ended"] - began}
