"""Over a run that is interrupted, every image is trained on exactly once an epoch: none is left out, none comes twice.

Each image is the only one of its class, so that labels are the images' numbers, and is filled with a level of its own,
so that pixels tell the number too.
"""

import json
import signal

import numpy as np
import pytest
from PIL import Image

from xattn import data
from xattn.cli import main
from xattn.config import load_config
from xattn.train import Preempted, train

IMAGES, BATCH, STEPS = 37, 8, 14  # three epochs and one image; no epoch ends where a batch does


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The images in three files, as a user packs them."""
    root = tmp_path_factory.mktemp("data")
    for number in range(IMAGES):
        folder = root / "images" / "train" / f"class{number:02d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (12, 10), (20 + 5 * number,) * 3).save(folder / "0.jpg")
    assert main(["data", "prepare", "images", str(root / "images"), str(root / "records"), "--shards=3"]) == 0
    return root / "records"


class Crash(Exception):
    pass


def crash():
    raise Crash


def sigterm():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("devices, interrupt, resumes_at", [(1, crash, 6), (8, sigterm, 8)])
def test_every_image_comes_once_an_epoch(records, tmp_path, monkeypatch, devices, interrupt, resumes_at):
    config = load_config("perceiver_io/imagenet_fourier:smoke").unlock()
    config.data = {"name": "imagenet_arrayrecord", "root": str(records), "image_size": 8}
    config.pipeline = {"name": "examples", "batch_size": BATCH}
    sizes = {"num_classes": IMAGES, "image_size": 8, "patch_size": 8, "features": 8, "depth": 0, "num_heads": 1}
    config.model = {"name": "vit"} | sizes
    config.validation, config.evals = {}, {}
    config.checkpoint.every = 6
    config.num_steps = STEPS
    config.mesh.data = devices

    stream, consumed, starts = data.batches, {}, []

    def watched(source, pipeline, **position):
        batches = stream(source, pipeline, **position)
        if not position:  # only looks whether there is such a stream
            return batches
        starts.append(position["start_step"])
        return watch(batches, position["start_step"])

    def watch(batches, start):
        for step, batch in enumerate(batches, start=start):
            levels = batch["image"].mean((1, 2, 3))
            np.testing.assert_array_equal(np.rint((levels - 20) / 5), batch["label"])
            if step == 7 and len(starts) == 1:
                interrupt()
            np.testing.assert_array_equal(consumed.setdefault(step, batch["label"]), batch["label"])
            yield batch

    monkeypatch.setattr(data, "batches", watched)
    with pytest.raises((Preempted, Crash)):
        train(config, tmp_path)
    train(config, tmp_path)
    assert starts == [0, resumes_at]
    assert list(consumed) == list(range(STEPS))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))

    numbers = np.concatenate(list(consumed.values()))
    assert len(numbers) == STEPS * BATCH == 3 * IMAGES + 1
    epochs = numbers[: 3 * IMAGES].reshape(3, IMAGES)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(IMAGES), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
