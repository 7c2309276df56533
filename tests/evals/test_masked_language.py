"""Accuracy and bits on hidden bytes, for models whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.evals.toys import config, toy
from xattn import data, evals
from xattn.config import UsageError
from xattn.evals.masked_language import describe_masked_language

A, B, SPACE = (6 + ord(letter) for letter in "ab ")


class Always(nn.Module):
    """Is as sure as `strength` of one byte."""

    byte: int
    strength: float

    def __call__(self, tokens, input_mask, *, train=False):
        return self.strength * jnp.broadcast_to(jax.nn.one_hot(self.byte, 262), (*tokens.shape, 262))


def text(words):
    """Words of two equal bytes, such as "aa bb ", as tokens."""
    return [token for byte in words for token in (byte, byte, SPACE)]


@pytest.fixture(autouse=True)
def source(monkeypatch):
    train = np.array([text([A, A, A, B])] * 3, np.int32)
    test = np.array([text([A] * 4), text([B] * 4), text([B] * 4)], np.int32)
    monkeypatch.setitem(data.SOURCES, "toy", toy(train={"tokens": train}, test={"tokens": test}))


def run(model, rate=1.0, **options):
    settings = config("masked_language", transforms=dict(mask_words=dict(rate=rate)))
    return evals.run(dict(name="masked_language", **options), model, {}, settings)


def test_the_unigram_guess_is_the_favourite_of_the_training_split():
    """The first text is all a, the favourite; the others are all b. Spaces, most common of all, are never hidden."""
    for byte, per_example in ((A, [1, 0, 0]), (B, [0, 1, 1])):
        result = run(Always(byte, 9.0))
        assert result["per_example"] == per_example
        assert result["accuracy"] == pytest.approx(np.mean(per_example))
        assert result["unigram_accuracy"] == pytest.approx(1 / 3)


def test_bits_are_to_base_two():
    assert run(Always(A, 0.0))["bits_per_byte"] == pytest.approx(np.log2(262))
    sure = np.log2(np.exp(5.0) + 261) - 5.0 / np.log(2)
    unsure = np.log2(np.exp(5.0) + 261)
    assert run(Always(A, 5.0))["bits_per_byte"] == pytest.approx((sure + 2 * unsure) / 3, rel=1e-5)


def test_texts_in_a_call_do_not_change_what_is_hidden():
    results = [run(Always(B, 1.0), rate=0.5, batch_size=size) for size in (1, 2, 8)]
    assert results[0] == results[1] == results[2]


def test_without_hidden_bytes_there_is_nothing_to_measure():
    with pytest.raises(UsageError, match="config.pipeline.transforms has no 'mask_words'"):
        evals.check(dict(name="masked_language"), Always(A, 1.0), config("masked_language"), "config.evals")


def test_every_hidden_byte_counts_the_same(monkeypatch):
    """One text of 2 words of a, one of 4 words of b, one of space: 4, 8 and 0 hidden bytes."""
    test = np.array([text([A] * 2) + [SPACE] * 6, text([B] * 4), [SPACE] * 12], np.int32)
    monkeypatch.setitem(data.SOURCES, "toy", toy(train={"tokens": test}, test={"tokens": test}))
    result = run(Always(A, 5.0))
    assert result["accuracy"] == pytest.approx(4 / 12) == pytest.approx(np.mean(result["per_example"]))
    assert result["unigram_accuracy"] == pytest.approx(8 / 12)
    sure, unsure = np.log2(np.exp(5.0) + 261) - 5.0 / np.log(2), np.log2(np.exp(5.0) + 261)
    assert result["bits_per_byte"] == pytest.approx((4 * sure + 8 * unsure) / 12, rel=1e-5)
    residuals = (np.array([4, 0, 0]) - 4 / 12 * np.array([4, 8, 0])) / 4
    assert result["ci95"] == pytest.approx(1.96 * residuals.std() / np.sqrt(3), rel=1e-5)


def test_texts_of_space_alone_have_nothing_to_measure(monkeypatch):
    blank = np.full((2, 12), SPACE, np.int32)
    monkeypatch.setitem(data.SOURCES, "toy", toy(train={"tokens": blank}, test={"tokens": blank}))
    with pytest.raises(UsageError, match="not a byte of the 2 texts of 'test' is hidden"):
        run(Always(B, 1.0))


def test_a_guess_that_is_never_right_is_described_without_a_ratio(monkeypatch):
    train, test = np.array([text([A] * 4)], np.int32), np.array([text([B] * 4)], np.int32)
    monkeypatch.setitem(data.SOURCES, "toy", toy(train={"tokens": train}, test={"tokens": test}))
    assert describe_masked_language(run(Always(B, 1.0))).startswith("unigram guess 0.00, ")
