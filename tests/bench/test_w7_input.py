"""The inputs of the pipeline's benchmark; what it measures is no matter for a test."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

from xattn.bench.w7_input import image_seconds, jpeg, streams, write_images


def test_files_are_like_imagenets_and_the_same_every_time():
    files = [jpeg(number) for number in range(24)]
    assert 86_000 < np.mean([len(file) for file in files]) < 96_000 and files[3] == jpeg(3)
    assert {Image.open(io.BytesIO(file)).size for file in files} == {(500, 375)} and len(set(files)) == 24


@pytest.mark.parametrize("num_layers", [0, 2])
def test_every_way_reads_the_same_images(tmp_path, num_layers):
    """Whole images, each scaled to a few pixels, tell which ones were read."""
    write_images(tmp_path, 6)
    for way, stream in streams(tmp_path, num_layers, cores=2, batch_size=6, size=16).items():
        batches = stream()
        batch = next(batches)
        batches.close()
        assert batch["image"].shape == (6, 16, 16, 3) and batch["image"].dtype == np.uint8, way
        assert sorted(batch["label"].tolist()) == list(range(6)), way


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_a_sample_has_as_many_batches_of_every_thread(cores):
    taken = []

    def stream():
        while True:
            taken.append(0)
            yield {"label": np.zeros(5)}

    image_seconds(stream, 0.0, cores)
    assert len(taken) == 3 * cores  # two of each to warm up
    image_seconds(stream, 0.01, cores)
    assert len(taken) % cores == 0


def test_a_sample_ends_its_threads(tmp_path):
    write_images(tmp_path, 4)
    wall, cpu = image_seconds(streams(tmp_path, 0, cores=2, batch_size=2, size=16)["xattn fast"], 0.0, cores=2)
    assert wall > 0 and cpu >= 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]
