"""The benchmark's arithmetic and its inputs; what it measures is no matter for a test."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from xattn.bench.input_pipeline import WAYS, jpeg, main, streams, summary, table, verdicts, write_images


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


def rounds(*foreign, fast=(150, 140, 180)):
    rates = [{"plain": 100, "fast": value, "pillow": 100, "one thread": 80} for value in fast]
    cpu_rates = {"plain": 50, "fast": 100, "pillow": 50, "one thread": 80}
    return [
        {"rates": rates[place % 3], "cpu_rates": cpu_rates, "foreign": share} for place, share in enumerate(foreign)
    ]


def test_ratios_are_those_of_a_round_and_loud_rounds_are_left_out_if_there_are_enough():
    few = summary(rounds(0.0, 0.5, 0.5), cores=2)
    assert (few["rounds"], few["quiet"], few["foreign"]) == (3, 1, 0.5)
    assert few["ways"]["fast"]["ratio"] == [1.45, 1.5, 1.65] and few["ways"]["plain"]["ratio"] == [1, 1, 1]
    assert few["ways"]["fast"]["cpu_ratio"] == [2, 2, 2]
    np.testing.assert_allclose(few["ways"]["fast"]["of_cores"], np.array([145, 150, 165]) / 160)
    many = summary(rounds(0.0, 0.01, 0.5, 0.02, 0.08, 0.09, 0.03), cores=2)
    assert (many["rounds"], many["quiet"]) == (5, 5)
    assert many["ways"]["fast"]["rate"] == [140, 150, 150]
    assert all(way in table("crop", many) for way in WAYS) and "1.500 [1.400, 1.500]" in table("crop", many)


def test_verdicts_are_of_the_medians():
    found = verdicts(summary(rounds(*[0.0] * 6), cores=2))
    assert found["ratio"] == {"goal": 1.28, "found": 1.5, "verdict": "met"}
    assert found["of_cores"] == {"goal": 0.95, "found": 150 / 160, "verdict": "missed"}
    loud = verdicts(summary(rounds(*[0.0] * 4, 0.5, 0.5), cores=2))
    assert {entry["verdict"] for entry in loud.values()} == {"noisy"}


def test_the_command_prints_one_object(capsys):
    main(["--images=4", "--rounds=1", "--seconds=0", "--batch-size=4", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert set(report["crop and mirror"]["ways"]) == set(WAYS) and report["images"] == 4
    assert set(report["crop and mirror"]["goals"]) == {"ratio", "of_cores"}
