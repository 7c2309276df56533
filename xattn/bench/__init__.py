"""Benchmarks: ratios to a named peer, measured by turns in one run. `docs/performance.md` tells how to read them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

# Module of each workload; its `cases(request, **sizes)` makes the blocks of the table.
WORKLOADS = {
    "W1": "xattn.bench.w1_cross_attention",
    "W2": "xattn.bench.w2_perceiver_encode",
    "W3": "xattn.bench.w3_crossvit",
    "W4": "xattn.bench.w4_rerank",
    "W5": "xattn.bench.w5_episode",
    "W6": "xattn.bench.w6_distributed",
    "W7a": "xattn.bench.w7_input",
    "W7b": "xattn.bench.w7b_start",
    "dispatch": "xattn.bench.dispatch",
}
QUICK = ("W1", "W2", "W6")
FULL = ("W1", "W2", "W3", "W4", "W5", "W6", "W7a", "W7b")
SIMULATED = {"W6": 8}
"""Workloads of a process with this many simulated devices, whatever the machine has."""
MODES = ("two-core", "one-core", "device")
PEERS = ("torch", "timm", "hf", "flax")
DTYPES = ("f32", "bf16")


@dataclasses.dataclass(frozen=True)
class Request:
    """What the parent asks a child process to measure.

    Attributes:
      workload: a key of `WORKLOADS`.
      suite: "quick" or "full".
      mode: "two-core", "one-core" or "device".
      threads: cores that the process may use.
      budget_s: seconds of rounds for a block; at least five rounds are made.
      peers: packages whose rows are measured; None for all that are installed.
      dtype: "f32" or "bf16", of arrays and computation.
      roofline: rates of the machine from `xattn.bench.roofline`.
      profile: whether to tell where the time of ours goes.
      sizes: keywords of the workload's `cases` that replace its sizes.
    """

    workload: str
    suite: str = "full"
    mode: str = "two-core"
    threads: int = 2
    budget_s: float = 20.0
    peers: Sequence[str] | None = None
    dtype: str = "f32"
    roofline: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    profile: bool = False
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """What `Request(**json.loads(...))` reads."""
        return json.dumps(dataclasses.asdict(self))
