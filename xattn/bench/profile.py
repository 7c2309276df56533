"""Where the time of a compiled program goes: the profiler's times of its instructions, summed by what they compute."""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

CALLS = 5
LINES = 10
_CALLERS = ("while", "call", "conditional", "fusion")
"""An event of one of these contains those of the instructions that it runs; of a fusion there is one event."""


def profile(run: Callable[[], Any], hlo: str, lines: int = LINES) -> list[dict[str, Any]]:
    """`[{"what", "ms", "share"}]` of a call, the largest first, what is left as "the rest".

    Args:
      run: starts one call of the program, which is warm.
      hlo: the compiled program's text, which says what an instruction computes.
      lines: how many to tell apart.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names, spent = meanings(hlo), collections.Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if name in names and event.get("ph") == "X":
            spent[names[name]] += event["dur"] / 1e3 / CALLS
    total = sum(spent.values())
    rows = [{"what": what, "ms": ms, "share": ms / total} for what, ms in spent.most_common(lines)]
    rest = total - sum(row["ms"] for row in rows)
    return rows + ([{"what": "the rest", "ms": rest, "share": rest / total}] if len(spent) > lines else [])


def meanings(hlo: str) -> dict[str, str]:
    """What each instruction computes, such as "query/dot_general" or "backward of norm1/mul": module and operation.

    Numbers of equal modules become "*". Instructions that only run others are left out.
    """
    found = {}
    for name, kind, rest in re.findall(r"%?([\w.\-]+) = [^=]*?\s([\w\-]+)\((.*)", hlo):
        if kind in _CALLERS[:-1]:
            continue
        path = re.search(r'op_name="([^"]*)"', rest)
        words = re.sub(r"\d+", "*", path[1]).split("/") if path else [kind]
        backward = any(word.startswith("transpose(") for word in words)
        words = [word for word in words if not re.search(r"[(),>]|^closed_call|^checkpoint|^body|^while", word)]
        found[name] = ("backward of " if backward else "") + "/".join(words[-2:] or [kind])
    return found
