import numpy as np
import pytest

from xattn.config import UsageError
from xattn.data.byte_tokenizer import CLS, MASK, PAD, SEP, VOCAB_SIZE, decode, encode


def test_every_byte_and_any_text_comes_back():
    assert encode(bytes(range(256))).tolist() == list(range(6, 262)) and VOCAB_SIZE == 262
    for text in ("", "def f(x):\n\treturn x\r\n", "héllo wörld, 교차 어텐션 \N{ROCKET}"):
        assert decode(encode(text)) == decode(encode(text, 100, special_tokens=True)) == text
    assert encode("a").dtype == np.int32


def test_special_tokens_agree_with_transformers_and_move_the_bytes_by_one():
    # What PerceiverTokenizer of transformers 5.23.0 gives.
    assert encode("héllo w", special_tokens=True).tolist() == [4, 110, 201, 175, 114, 114, 117, 38, 125, 5]
    plain, special = encode("some words", 16), encode("some words", 16, special_tokens=True)
    np.testing.assert_array_equal(special[1:11], plain[:10])
    assert special[[0, 11, 12]].tolist() == [CLS, SEP, PAD] and (plain[10:] == PAD).all()


def test_special_tokens_are_left_out_and_bytes_that_are_no_text_are_marked():
    assert decode([CLS, 72 + 6, MASK, 105 + 6, SEP, PAD, PAD]) == "Hi"
    assert decode([0xC3 + 6, 65 + 6]) == "\N{REPLACEMENT CHARACTER}A"


def test_a_text_that_is_too_long_is_refused():
    assert len(encode("12345", 5)) == 5
    with pytest.raises(UsageError, match="the text has 7 tokens, but only 6 fit: shorten it"):
        encode("12345", 6, special_tokens=True)
