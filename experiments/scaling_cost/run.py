"""Memory and traffic of a training step on one device of 1 to 256, by how the mesh is laid out.

    python experiments/scaling_cost/run.py

No step is run: each is compiled for simulated devices, as `xattn inspect --mesh` does. Prints a table and writes
scaling_cost.png beside this file.
"""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from xattn.analysis import simulate_devices, step_cost
from xattn.config import Config, cache_compiled_programs, load_config

DEVICES = (1, 4, 16, 64, 256)
LAYOUTS = {
    "data": lambda devices: {"data": devices},
    "fsdp": lambda devices: {"data": 1, "fsdp": devices},
    "fsdp x tensor": lambda devices: {"data": 1, "fsdp": devices // 4, "tensor": 4},
}
MIB = 2**20


def make_config(devices: int) -> Config:
    """Perceiver IO of the ImageNet model's width on digits, two layers deep, one image for each device."""
    config = load_config("perceiver_io/imagenet_fourier:digits")
    config.model.encoder.update(num_latents=128, latent_features=1024, qk_features=1024, v_features=1024)
    config.model.decoder.queries.positions.features = 1024
    config.pipeline.batch_size = devices
    return config


def measure(devices: int, sizes: dict[str, int]) -> dict[str, Any]:
    """The figures of one mesh, in MiB on one device."""
    report = step_cost(make_config(devices), sizes)
    held, sent = report["memory"], report["collectives"]
    large = ("all-gather", "all-reduce")
    return {
        "devices": devices,
        "arguments": held["arguments"] / MIB,
        "temporaries": held["temporaries"] / MIB,
        **{kind: sent[kind]["bytes"] / MIB if kind in sent else 0.0 for kind in large},
        "other": sum(traffic["bytes"] for kind, traffic in sent.items() if kind not in large) / MIB,
        "collectives": sum(traffic["count"] for traffic in sent.values()),
    }


def main() -> None:
    """Compiles, prints each row as soon as it is known, and draws."""
    cache_compiled_programs()
    simulate_devices(max(DEVICES))
    rows: dict[str, list[dict[str, Any]]] = {layout: [] for layout in LAYOUTS}
    for layout, mesh in LAYOUTS.items():
        for devices in DEVICES if layout == "data" else DEVICES[1:]:
            row = measure(devices, mesh(devices))
            if devices == 1:
                print(f"| layout | {' | '.join(row)} |\n|---|{'---|' * len(row)}")
            cells = (f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" for value in row.values())
            print(f"| {layout} | {' | '.join(cells)} |", flush=True)
            rows[layout].append(row)
    draw(rows, Path(__file__).with_name("scaling_cost.png"))


def draw(layouts: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """What a device holds, and what it sends in one step."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    held, sent = figure.subplots(1, 2)
    for layout, rows in layouts.items():
        devices = [row["devices"] for row in rows]
        held.plot(devices, [row["arguments"] + row["temporaries"] for row in rows], marker="o", label=layout)
        sent.plot(devices, [row["all-gather"] + row["all-reduce"] + row["other"] for row in rows], marker="o")
    held.set(xscale="log", xlabel="devices", ylabel="arguments and temporaries, MiB", ylim=(0, None))
    sent.set(xscale="log", xlabel="devices", ylabel="sent by one device in a step, MiB", ylim=(0, None))
    for panel in (held, sent):
        panel.set_xticks(DEVICES, [str(count) for count in DEVICES])
        panel.minorticks_off()
    held.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
