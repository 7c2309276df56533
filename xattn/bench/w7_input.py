"""W7a: how fast training images come, against a plain grain + Pillow loop.

JPEG files of 500 x 375 pixels, 91 kB on average, are written to a temporary folder and read as batches of 64 random
crops of 224 x 224, mirrored half of the time. A sample is a second of one way, with its threads started and those of
the way before it ended; times are those of one image. It ends with a batch of every thread: they finish their batches
at about the same moment, and a sample that ended with the first would miss those that are nearly done.
"""

import io
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
from xattn.bench import Request
from xattn.bench.measure import Case, Program, Row, scratch_folder
from xattn.data.textures import Texture
from xattn.data.timm_augment import TimmRandAugment
from xattn.data.transforms import draw_crop

PLAIN = "plain grain + Pillow"

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
    """The ways to read the images, by their names in the table; each can be opened again and again."""
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

    return {
        "xattn fast": xattn("fast", cores),
        "xattn pillow": xattn("pillow", cores),
        "xattn fast, one thread": xattn("fast", 0),
        PLAIN: plain,
    }


def image_seconds(stream: Stream, seconds: float, cores: int) -> tuple[float, float]:
    """Wall and CPU seconds an image, over `seconds` after two batches a core, until each core has made as many."""
    with closing(stream()) as batches:
        for _ in range(2 * cores):
            next(batches)
        count, images, began, cpu = 0, 0, time.perf_counter(), time.process_time()
        while not count or count % cores or time.perf_counter() - began < seconds:
            images += len(next(batches)["label"])
            count += 1
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join()
    return elapsed / images, cpu / images


def cases(
    request: Request, images: int = 128, seconds: float = 1.0, batch_size: int = 64, size: int = 224
) -> list[Case]:
    """The blocks: crops alone, and with timm's RandAugment. `images` files are read over and over."""
    folder = scratch_folder()
    write_images(folder, images)

    def block(title: str, num_layers: int) -> Case:
        ways = streams(folder, num_layers, request.threads, batch_size, size)

        def row(name: str, stream: Stream) -> Row:
            def sample() -> tuple[float, float]:
                return image_seconds(stream, seconds, request.threads)

            return Row(name, "reference" if name == PLAIN else "ours", lambda: Program(sample=sample))

        shape = f"JPEG 500x375 to {size}x{size}, batch {batch_size}, an image"
        return Case(title, shape, [row(*way) for way in ways.items()], (PLAIN,))

    return [block("crop and mirror", 0), block("RandAugment", 2)]
