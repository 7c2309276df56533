"""How fast training images come, against a plain grain + Pillow loop that is measured in the same run.

    python -m xattn.bench.input_pipeline [--images=128] [--rounds=9] [--seconds=2] [--json]

JPEG files of 500 x 375 pixels, 91 kB on average, are written to a temporary folder and read as batches of 64 random
crops of 224 x 224, mirrored half of the time:

    plain        what one writes without xattn: grain's MapDataset with a thread a core, Pillow
    fast         xattn's source `imagenet` and its pipeline, with the decoder "fast"
    pillow       the same with the decoder "pillow"
    one thread   as fast, but in one thread: as many times this as there are cores is what could be reached

and all of it again with timm's RandAugment. A round measures each way once, in an order drawn anew, with its threads
started, and those of the way before it ended. What is compared are the rates of one round: medians over the rounds,
and quartiles in brackets. Rounds in which other processes took more than 8 % of the machine are left out if five or
more remain. Where none is quiet, "by CPU time", images a second of this process's CPU time, is what to trust.
"""

import argparse
import gc
import io
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import grain
import numpy as np
from PIL import Image

from xattn import data
from xattn.data.textures import Texture
from xattn.data.timm_augment import TimmRandAugment
from xattn.data.transforms import draw_crop

WAYS = ("plain", "fast", "pillow", "one thread")
GOALS = {"ratio": 1.28, "of_cores": 0.95}  # of fast to plain, and to cores x one thread
_FOREIGN = 0.08
_ENOUGH = 5

Stream = Callable[[], Any]  # opens an iterator of batches that can be closed


def jpeg(number: int) -> bytes:
    """A file of 500 x 375 pixels: waves and noise, of which some images have more than others."""
    rng = np.random.default_rng(number)
    pixels = Texture.random(rng, shortest=4.0, longest=300.0).draw(375, 500, np.eye(2), np.zeros(2))
    pixels = pixels + rng.uniform(6, 18) * rng.standard_normal((375, 500, 1), np.float32)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=82)
    return file.getvalue()


def write_images(root: Path, count: int) -> None:
    """Writes `count` files as the source `imagenet` reads them, in ten classes."""
    for number in range(count):
        path = root / "train" / f"class{number % 10}" / f"{number:05d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))


def streams(root: Path, num_layers: int, cores: int, batch_size: int = 64, size: int = 224) -> dict[str, Stream]:
    """The ways to read the images, by their names in `WAYS`; each can be opened again and again."""
    transform = {"name": "timm", "num_layers": num_layers, "magnitude": 9}
    options = {"name": "imagenet", "root": root, "image_size": size, "transform": transform}
    sources = {decoder: data.build(options | {"decoder": decoder}, split="train") for decoder in ("fast", "pillow")}
    files, labels = sources["pillow"].files, sources["pillow"].labels
    augment = TimmRandAugment(num_layers, 9)

    def read(element: tuple[Path, int], rng: np.random.Generator) -> dict[str, Any]:
        file, label = element
        with Image.open(file) as image:
            part = image.crop(draw_crop(*image.size, rng)).convert("RGB")
        part = part.resize((size, size), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"image": np.asarray(augment(part, rng)), "label": np.int32(label)}

    def plain() -> Any:
        elements = grain.MapDataset.source(list(zip(files, labels, strict=True))).seed(0).shuffle().repeat()
        batches = elements.random_map(read).batch(batch_size)
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=cores, prefetch_buffer_size=2 * cores)))

    def xattn(decoder: str, num_threads: int) -> Stream:
        pipeline = {"name": "examples", "batch_size": batch_size, "seed": 0, "num_threads": num_threads}
        return lambda: data.batches(sources[decoder], pipeline)

    ways = (plain, xattn("fast", cores), xattn("pillow", cores), xattn("fast", 0))
    return dict(zip(WAYS, ways, strict=True))


def rate(stream: Stream, seconds: float, warm_up: int) -> tuple[float, float, float]:
    """Images a second, images a second of CPU time, and the share of the machine that other processes took."""
    with closing(stream()) as batches:
        for _ in range(warm_up):
            next(batches)
        images, began, before = 0, time.perf_counter(), _cpu_seconds()
        while (elapsed := time.perf_counter() - began) < seconds or not images:
            images += len(next(batches)["label"])
        elapsed, (busy, own) = time.perf_counter() - began, np.subtract(_cpu_seconds(), before)
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join()
    return images / elapsed, images / own, max(0.0, (busy - own) / elapsed / _cores())


def measure(ways: dict[str, Stream], rounds: int, seconds: float, seed: int = 0) -> list[dict[str, Any]]:
    """The rounds: images a second and a CPU second by way, and the largest share that other processes took."""
    shuffle, measured = random.Random(seed), []
    for number in range(-1, rounds):  # the first is for the caches
        order = shuffle.sample(WAYS, len(WAYS))
        found = {way: rate(ways[way], seconds, warm_up=2 * _cores()) for way in order}
        if number >= 0:
            rates, cpu_rates = ({way: found[way][place] for way in WAYS} for place in (0, 1))
            foreign = max(share for *_, share in found.values())
            measured.append({"rates": rates, "cpu_rates": cpu_rates, "foreign": foreign})
    return measured


def summary(rounds: list[dict[str, Any]], cores: int) -> dict[str, Any]:
    """Of each way the rate and its ratios to plain and to cores x one thread, as (quartile, median, quartile)."""
    quiet = [entry for entry in rounds if entry["foreign"] <= _FOREIGN]
    used = quiet if len(quiet) >= _ENOUGH else rounds
    rates, cpu_rates = (
        {way: np.array([entry[name][way] for entry in used]) for way in WAYS} for name in ("rates", "cpu_rates")
    )
    quartiles = {
        way: {
            name: np.percentile(values, (25, 50, 75)).tolist()
            for name, values in (
                ("rate", rates[way]),
                ("ratio", rates[way] / rates["plain"]),
                ("cpu_ratio", cpu_rates[way] / cpu_rates["plain"]),
                ("of_cores", rates[way] / (cores * rates["one thread"])),
            )
        }
        for way in WAYS
    }
    foreign = float(np.median([entry["foreign"] for entry in used]))
    return {"ways": quartiles, "rounds": len(used), "quiet": len(quiet), "foreign": foreign}


def table(title: str, result: dict[str, Any]) -> str:
    """The summary for people to read."""
    lines = [
        f"{title}: {result['rounds']} rounds used, {result['quiet']} quiet, other processes took "
        f"{100 * result['foreign']:.0f} % of the machine",
        f"  {'':<12}{'images/s':>9}   {'ratio to plain':<22}{'by CPU time':<22}{'ratio to cores x one thread'}",
    ]
    for way, found in result["ways"].items():
        names = ("ratio", "cpu_ratio", "of_cores")
        cells = ["{1:.3f} [{0:.3f}, {2:.3f}]".format(*found[name]).ljust(22) for name in names]
        lines.append(f"  {way:<12}{found['rate'][1]:>9.0f}   {''.join(cells)}".rstrip())
    return "\n".join(lines)


def verdicts(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The goals for fast, and whether the medians reach them; "noisy" where too few rounds were quiet to tell."""
    found = {}
    for name, goal in GOALS.items():
        median = result["ways"]["fast"][name][1]
        verdict = "noisy" if result["quiet"] < _ENOUGH else "met" if median >= goal else "missed"
        found[name] = {"goal": goal, "found": median, "verdict": verdict}
    return found


def main(argv: list[str] | None = None) -> None:
    """Measures without and with RandAugment and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="files")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0, help="for a way in a round")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {"cores": _cores(), "images": arguments.images}
    gc.disable()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), arguments.images)
        sizes = [path.stat().st_size for path in Path(folder).rglob("*.JPEG")]
        report["mean_kilobytes"] = float(np.mean(sizes)) / 1000
        for title, num_layers in (("crop and mirror", 0), ("crop, mirror, RandAugment", 2)):
            ways = streams(Path(folder), num_layers, _cores(), arguments.batch_size)
            rounds = measure(ways, arguments.rounds, arguments.seconds)
            result = summary(rounds, _cores())
            report[title] = result | {"measured": rounds} | ({"goals": verdicts(result)} if not num_layers else {})
            if not arguments.json:
                print(table(title, result), flush=True)
                for name, verdict in report[title].get("goals", {}).items():
                    print(f"  goal: fast has {name} >= {verdict['goal']}: {verdict['found']:.3f}, {verdict['verdict']}")
    gc.enable()
    if arguments.json:
        print(json.dumps(report, indent=1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _cpu_seconds() -> tuple[float, float]:
    """What all processes and what this one has computed so far; where the first is not told, the second twice."""
    own = time.process_time()
    try:
        user, nice, system, _, _, *others = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return own, own
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK"), own


if __name__ == "__main__":
    main()
