"""Letters: which they are, how the splits differ, and that GlyphFS draws the same."""

import numpy as np
import pytest

from xattn import data
from xattn.config import UsageError
from xattn.data import glyphs
from xattn.data.glyphs import GlyphFS, code_points
from xattn.data.letters import LETTERS, Letters


def test_classes_are_the_first_of_the_training_split_that_twelve_faces_hold():
    faces = [held for _, _, held in glyphs._faces()]
    well_held = [code for code in code_points("train") if sum(code in held for held in faces) >= 12]
    assert [ord(letter) for letter in LETTERS] == well_held[:100]
    assert Letters.class_names[0] == "U+0041"


def test_a_letter_is_drawn_as_glyphfs_draws_it():
    """Seed 0 of GlyphFS is the first of the ten of train."""
    glyphs, letters = GlyphFS("train"), Letters("train")
    label = LETTERS.index("R")
    mine = letters.example(40 * label + 7, None)
    theirs = glyphs.images(np.array([40 * code_points("train").index(ord("R")) + 7]))[0]
    np.testing.assert_array_equal(mine["image"], theirs)
    assert mine["label"] == label


def test_splits_are_drawn_with_other_maps():
    train, val, test = (Letters(split) for split in ("train", "val", "test"))
    assert (train.num_examples, val.num_examples, test.num_examples) == (40_000, 4_000, 4_000)
    images = [source.example(0, None)["image"] for source in (train, val, test)]
    images += [train.example(4_000 * draw, None)["image"] for draw in range(1, 10)]
    assert len({image.tobytes() for image in images}) == 12
    assert train.example(4_000 * 9, None)["label"] == 0 and train.example(39_999, None)["label"] == 99


def test_bad_keywords_are_refused():
    with pytest.raises(UsageError, match="there is no jitter of letters 'wild'"):
        data.build(dict(name="letters", jitter="wild"), split="train")
