"""A run that is saved on one layout of devices and processes and continued on another."""

import json
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.distributed import launch
from xattn import data
from xattn.checkpoints import Checkpoints
from xattn.config import load_config
from xattn.parallel.distributed import fetch
from xattn.train import train

# Name: processes, devices of each, and the mesh over them.
LAYOUTS = {
    "one": (1, 1, dict(data=1)),
    "eight": (1, 8, dict(data=8)),
    "cube": (1, 8, dict(data=2, fsdp=2, tensor=2)),
    "two": (2, 4, dict(data=4, fsdp=2)),
}


def segments(*words: str) -> None:
    """One process that trains parts of runs; each word is LAYOUT:NUM_STEPS:WORKDIR.

    Beside the workdir: `<workdir>_rows_<process>.jsonl` with a hash of each example of each batch, and
    `<workdir>_saved.npz` and `<workdir>_restored.npz` with every array.
    """
    stream, save, restore = data.batches, Checkpoints.save, Checkpoints.restore_latest
    for word in words:
        layout, num_steps, name = word.split(":")
        workdir = Path(name)

        def batches(*arguments: Any, workdir: Path = workdir, **position: Any) -> Any:
            found = stream(*arguments, **position)
            return _noted(found, workdir, position["start_step"]) if "start_step" in position else found

        def saving(self: Any, step: int, model: Any, training: Any, *rest: Any, workdir: Path = workdir) -> None:
            _dump(workdir.with_name(f"{workdir.name}_saved.npz"), (model, training))
            save(self, step, model, training, *rest)

        def restoring(self: Any, *targets: Any, workdir: Path = workdir) -> Any:
            found = restore(self, *targets)
            if found:
                _dump(workdir.with_name(f"{workdir.name}_restored.npz"), found[1:])
            return found

        data.batches, Checkpoints.save, Checkpoints.restore_latest = batches, saving, restoring
        config = load_config("protonet/glyphs:smoke").unlock()
        config.update(num_steps=int(num_steps), mesh=LAYOUTS[layout][2], ema_decay=0.9)
        config.pipeline.batch_size = 8
        config.checkpoint.every = 100
        config.validation, config.evals = {}, {}
        train(config, workdir)


def _noted(batches: Any, workdir: Path, start: int) -> Any:
    path = workdir.with_name(f"{workdir.name}_rows_{jax.process_index()}.jsonl")
    with path.open("a") as file:
        for step, batch in enumerate(batches, start=start):
            for row in range(len(batch["support"])):
                example = sha256(b"".join(batch[name][row].tobytes() for name in sorted(batch))).hexdigest()
                file.write(json.dumps([step, example]) + "\n")
            file.flush()
            yield batch


def _dump(path: Path, trees: Any) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(trees)[0]
    arrays = {jax.tree_util.keystr(place): fetch(leaf) for place, leaf in leaves}
    if jax.process_index() == 0:
        np.savez(path, **arrays)


def restore_pairs(folder: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Trains three steps on the first layout of each pair and three on the second; AssertionError if that shows."""
    first = sorted({a for a, _ in pairs})
    _run(folder, [("one", 6, folder / "whole"), *((a, 3, folder / a) for a in first)])
    for a, b in pairs:
        shutil.copytree(folder / a, folder / f"{a}_{b}")
    _run(folder, [(b, 6, folder / f"{a}_{b}") for a, b in pairs])
    whole = _examples(folder, "whole")
    assert len(whole) == len(set(whole)) == 6 * 8
    for a, b in pairs:
        with np.load(folder / f"{a}_saved.npz") as saved, np.load(folder / f"{a}_{b}_restored.npz") as restored:
            assert saved.files == restored.files
            for place in saved.files:
                x, y = saved[place], restored[place]
                same = (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
                assert same, f"{a} to {b}: {place} is not what was saved"
        seen = sorted(_examples(folder, a) + _examples(folder, f"{a}_{b}"))
        assert seen == whole, f"{a} to {b}: other examples than those of a whole run"


def _run(folder: Path, jobs: Sequence[tuple[str, int, Path]]) -> None:
    """Each layout's segments in processes of their own."""
    for processes, devices in sorted({LAYOUTS[layout][:2] for layout, *_ in jobs}):
        words = [":".join(map(str, job)) for job in jobs if LAYOUTS[job[0]][:2] == (processes, devices)]
        where = folder / f"output_{processes}_{devices}_{len(list(folder.iterdir()))}"
        program = "tests.distributed.restore:segments"
        launch.run(program, *words, folder=where, num_processes=processes, num_devices=devices, timeout=300)


def _examples(folder: Path, name: str) -> list[tuple[int, str]]:
    lines = [line for path in folder.glob(f"{name}_rows_*.jsonl") for line in path.read_text().splitlines()]
    return sorted((step, example) for step, example in map(json.loads, lines))
