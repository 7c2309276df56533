"""Benchmarks: ratios to a named peer, measured by turns in one run. `docs/performance.md` tells how to read them."""

# Module of each workload; its `cases(request, **sizes)` makes the blocks of the table.
WORKLOADS = {
    "W1": "xattn.bench.w1_cross_attention",
    "W2": "xattn.bench.w2_perceiver_encode",
    "W3": "xattn.bench.w3_crossvit",
    "W4": "xattn.bench.w4_rerank",
    "W5": "xattn.bench.w5_episode",
    "W7a": "xattn.bench.w7_input",
    "W7b": "xattn.bench.w7b_start",
}
QUICK = ("W1", "W2")
MODES = ("two-core", "one-core", "device")
PEERS = ("torch", "timm", "hf", "flax")
DTYPES = ("f32", "bf16")
