"""The tables of sources and pipelines, and the keys that a config may give them."""

import numpy as np
import pytest

from xattn import data
from xattn.config import UsageError

EPISODES = {"name": "episodes", "ways": 5, "shots": 1, "queries": 3, "batch_size": 2}
EXAMPLES = {"name": "examples", "batch_size": 2}
EMBEDDED = ["digits", "glyphs", "moving_planes", "python_sources", "rendered_clips"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_batches_have_the_shapes_that_were_told_without_the_data(name):
    pipeline = EPISODES if name == "glyphs" else EXAMPLES
    config = {"name": name}
    (batch,) = data.batches(data.build(config, "train"), pipeline | {"seed": 0}, num_steps=1)
    told = data.batch_shapes(config, pipeline)
    assert {field: (rows.shape, rows.dtype) for field, rows in batch.items()} == {
        field: (shape.shape, shape.dtype) for field, shape in told.items()
    }


def test_batches_are_deterministic_over_builds():
    for name in EMBEDDED:
        pipeline = (EPISODES if name == "glyphs" else EXAMPLES) | {"seed": 0}
        first, second = (next(data.batches(data.build({"name": name}, "val"), pipeline)) for _ in range(2))
        for field, rows in first.items():
            np.testing.assert_array_equal(rows, second[field])


def test_every_source_tells_its_shapes_without_its_data_and_its_name():
    for name, source in data.SOURCES.items():
        assert source.name == name
        pipeline = EPISODES if hasattr(source, "images") else EXAMPLES
        assert data.batch_shapes({"name": name}, pipeline)
    assert data.batch_shapes({"name": "class_folders", "image_size": 20}, EPISODES)["query"].shape == (2, 15, 20, 20, 3)
    assert data.batch_shapes({"name": "imagenet", "image_size": 32}, EXAMPLES)["image"].shape == (2, 32, 32, 3)
    assert data.batch_shapes({"name": "autoflow"}, EXAMPLES)["flow"].shape == (2, 448, 576, 2)
    assert data.batch_shapes({"name": "autoflow", "image_size": (368, 496)}, EXAMPLES)["flow"].shape == (2, 368, 496, 2)


def test_shapes_are_told_with_the_transforms_of_images():
    transforms = {"random_erasing": {"probability": 0.5}, "mixup_or_cutmix": {"mixup_alpha": 0.2}}
    told = data.batch_shapes(
        {"name": "imagenet", "image_size": 32}, EXAMPLES | {"transforms": transforms, "repeats": 3}
    )
    assert {name: (field.shape, field.dtype) for name, field in told.items()} == {
        "image": ((2, 32, 32, 3), np.uint8),
        "label": ((2,), np.int32),
        "label_b": ((2,), np.int32),
        "mix": ((2,), np.float32),
    }


@pytest.mark.parametrize(
    "config, pipeline, sentence",
    [
        ({"name": "digit"}, EXAMPLES, "there is no data source 'digit': did you mean 'digits'?"),
        (
            {"name": "digits"},
            EXAMPLES | {"name": "example"},
            "there is no pipeline 'example': did you mean 'examples'?",
        ),
        ({"name": "digits", "split": "val"}, EXAMPLES, "config.data has no key 'split': the program sets it."),
        (
            {"name": "digits", "permute": 1},
            EXAMPLES,
            "config.data has no key 'permute': did you mean 'permute_pixels'?",
        ),
        ({"name": "glyphs"}, EPISODES | {"seed": 1}, "config.pipeline has no key 'seed': the program sets it."),
        (
            {"name": "digits"},
            EXAMPLES | {"start_step": 1},
            "config.pipeline has no key 'start_step': the program sets it.",
        ),
        (
            {"name": "digits"},
            EXAMPLES | {"transform": {}},
            "config.pipeline has no key 'transform': did you mean 'transforms'?",
        ),
        (
            {"name": "digits"},
            EPISODES,
            "the source 'digits' can't be read by the pipeline 'episodes': set config.pipeline.name to 'examples', or "
            "choose another source.",
        ),
        (
            {"name": "glyphs"},
            EXAMPLES,
            "the source 'glyphs' can't be read by the pipeline 'examples': set config.pipeline.name to 'episodes', or "
            "choose another source.",
        ),
        (
            {"name": "digits"},
            EXAMPLES | {"transforms": {"mask_words": {}}},
            "mask_words masks tokens, but the data has image, label: take config.pipeline.transforms.mask_words away, "
            "or choose a source of text.",
        ),
    ],
)
def test_mistakes_are_named(config, pipeline, sentence):
    with pytest.raises(UsageError) as error:
        data.batch_shapes(config, pipeline)
    assert str(error.value) == sentence


def test_the_same_mistakes_are_named_where_the_data_is_opened():
    with pytest.raises(UsageError, match="config.data has no key 'split'"):
        data.build({"name": "digits", "split": "val"}, "train")
    source = data.build({"name": "digits"}, "train")
    with pytest.raises(UsageError, match="config.pipeline has no key 'process_count'"):
        data.batches(source, EXAMPLES | {"seed": 0, "process_count": 2}, process_index=0, process_count=1)
    with pytest.raises(UsageError, match="can't be read by the pipeline 'episodes'"):
        data.batches(source, EPISODES | {"seed": 0})
