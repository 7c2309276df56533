import numpy as np
import pytest

from xattn.config import UsageError
from xattn.data.byte_tokenizer import CLS, MASK, PAD, SEP, encode
from xattn.data.mask_words import mask_words


def masked(text, seeds, length=None, special_tokens=False, **options):
    tokens = encode(text, length, special_tokens)
    return mask_words({"tokens": np.tile(tokens, (len(seeds), 1))}, np.asarray(seeds), **options)


def words_of(text, loss_mask):
    """For every word of an ASCII text, whether its bytes are masked: all of them, or none."""
    whole, start = [], 0
    for word in text.split():
        start = text.index(word, start)
        assert len(set(loss_mask[start : start + len(word)].tolist())) == 1, word
        whole.append(bool(loss_mask[start]))
        start += len(word)
    return whole


@pytest.mark.parametrize("num_words, rate, expected", [(20, 0.15, 3), (17, 0.15, 3), (16, 0.15, 2), (1, 0.15, 1)])
def test_exactly_so_many_words_are_masked_and_each_as_a_whole(num_words, rate, expected):
    rng = np.random.default_rng(0)
    text = " \n".join("x" * int(rng.integers(1, 9)) for _ in range(num_words))
    batch = masked(text, range(300), rate=rate)
    drawn = np.array([words_of(text, row) for row in batch["loss_mask"]])
    assert (drawn.sum(1) == expected).all()
    # All words are equally likely: five standard deviations of a binomial count.
    chance = expected / num_words
    assert (abs(drawn.mean(0) - chance) <= 5 * np.sqrt(chance * (1 - chance) / 300)).all()


def test_spaces_of_every_kind_separate_words_and_are_never_masked():
    text = "a\tb\nc\x0bd\x0ce\rf g"
    batch = masked(text, range(50), rate=0.3)
    assert (batch["loss_mask"].sum(1) == 2).all()
    assert not batch["loss_mask"][:, 1::2].any() and batch["loss_mask"][:, ::2].any(0).all()


def test_bytes_become_mask_and_targets_stay():
    batch = masked("three little words", range(8), length=24, rate=1.0)
    tokens = encode("three little words", 24)
    np.testing.assert_array_equal(batch["targets"], np.tile(tokens, (8, 1)))
    expected = [MASK if mask else token for token, mask in zip(tokens, batch["loss_mask"][0], strict=True)]
    assert batch["tokens"][0].tolist() == expected and batch["tokens"].dtype == np.int32
    assert "".join("x" if mask else "." for mask in batch["loss_mask"][0]) == "xxxxx.xxxxxx.xxxxx......"


def test_padding_and_special_tokens_are_never_masked():
    batch = masked("word", range(20), length=12, special_tokens=True, rate=1.0)
    assert batch["tokens"][0].tolist() == [CLS, MASK, MASK, MASK, MASK, SEP] + [PAD] * 6
    assert batch["input_mask"].tolist() == [[True] * 6 + [False] * 6] * 20


def test_a_row_without_words_is_left_alone():
    batch = masked(" \n ", [0], length=8)
    assert not batch["loss_mask"].any()
    np.testing.assert_array_equal(batch["tokens"], batch["targets"])


def test_bytes_of_other_alphabets_are_parts_of_words():
    """A no-break space, and what lies at 0x85 in Latin-1, are bytes of letters in UTF-8."""
    batch = masked("교차 ą\u00a0x", [0], rate=1.0)
    assert batch["loss_mask"][0].tolist() == [True] * 6 + [False] + [True] * 5


def test_a_row_depends_on_its_own_seed_alone():
    text = "one two three four five six seven eight"
    together = masked(text, [5, 6, 7, 5])["loss_mask"]
    np.testing.assert_array_equal(masked(text, [7])["loss_mask"][0], together[2])
    np.testing.assert_array_equal(together[0], together[3])
    assert len({tuple(row.tolist()) for row in masked(text, range(40))["loss_mask"]}) > 5


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="mask_words needs a rate above 0 and up to 1, but got 15"):
        masked("a b", [0], rate=15.0)
    with pytest.raises(UsageError, match="mask_words masks tokens, but the data has image: take"):
        mask_words({"image": np.zeros((2, 4, 4, 1), np.uint8)}, np.arange(2))
