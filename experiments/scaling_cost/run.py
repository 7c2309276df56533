"""Memory and traffic of a training step on one device of 1 to 256, one image a device, by how the mesh is laid out.

    python experiments/scaling_cost/run.py            about a quarter of an hour on two CPU cores; again: a minute

No step is run: each is compiled for simulated devices, as `xattn inspect --mesh` does. Prints a table for each config
and writes scaling_cost.png beside this file.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from xattn.analysis import simulate_devices, step_cost
from xattn.config import cache_compiled_programs, load_config

CONFIGS = ("crossvit/imagenet:9_240", "perceiver_io/imagenet_fourier")
DEVICES = (1, 4, 16, 64, 256)
LAYOUTS = {
    "data": lambda devices: {"data": devices},
    "fsdp": lambda devices: {"data": 1, "fsdp": devices},
    "fsdp x tensor": lambda devices: {"data": 1, "fsdp": devices // 4, "tensor": 4},
}
MIB = 2**20


def measure(name: str, devices: int, sizes: dict[str, int]) -> dict[str, Any]:
    """The figures of one mesh, in MiB on one device."""
    config = load_config(name)
    config.pipeline.batch_size = devices
    report = step_cost(config, sizes)
    held, sent = report["memory"], report["collectives"]
    state = sum(held[part] for part in ("parameters", "optimizer_state", "moving_average", "model_state"))
    return {
        "devices": devices,
        "parameters and optimizer": state / MIB,
        "temporaries": held["temporaries"] / MIB,
        **{kind: sent[kind]["bytes"] / MIB if kind in sent else 0.0 for kind in ("all-gather", "all-reduce")},
        "other": sum(t["bytes"] for kind, t in sent.items() if kind not in ("all-gather", "all-reduce")) / MIB,
        "collectives": sum(traffic["count"] for traffic in sent.values()),
    }


def study(name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of a config by layout; prints each as soon as it is known."""
    rows: dict[str, list[dict[str, Any]]] = {}
    print(f"\n{name}, MiB on one device\n", flush=True)
    for layout, mesh in LAYOUTS.items():
        rows[layout] = []
        for devices in DEVICES:
            if layout == "fsdp x tensor" and devices < 4:
                continue
            rows[layout].append(row := measure(name, devices, mesh(devices)))
            if len(rows) == len(rows[layout]) == 1:
                print(f"| layout | {' | '.join(row)} |\n|---|{'---|' * len(row)}")
            cells = (f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" for value in row.values())
            print(f"| {layout} | {' | '.join(cells)} |", flush=True)
    return rows


def draw(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """One row of panels a config: what a device holds between steps, and what it sends in one."""
    figure, axes = plt.subplots(len(results), 2, figsize=(9, 3.2 * len(results)), squeeze=False, layout="constrained")
    for (name, layouts), (held, sent) in zip(results.items(), axes, strict=True):
        for layout, rows in layouts.items():
            devices = [row["devices"] for row in rows]
            held.plot(devices, [row["parameters and optimizer"] for row in rows], marker="o", label=layout)
            traffic = [row["all-gather"] + row["all-reduce"] + row["other"] for row in rows]
            sent.plot(devices, traffic, marker="o", label=layout)
        held.set(title=name, ylabel="parameters and optimizer, MiB", xscale="log", yscale="log", xlabel="devices")
        sent.set(title="one step", ylabel="sent by one device, MiB", xscale="log", xlabel="devices", ylim=(0, None))
        for panel in (held, sent):
            panel.set_xticks(DEVICES, map(str, DEVICES))
            panel.minorticks_off()
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    cache_compiled_programs()
    simulate_devices(max(DEVICES))
    draw({name: study(name) for name in CONFIGS}, Path(__file__).with_name("scaling_cost.png"))
