"""Text as UTF-8 bytes: byte b is token b + 6, below it are six special tokens; 262 in all.

Perceiver IO (arXiv 2107.14795) feeds bytes alone. The tokenizer of transformers puts CLS before and SEP after them,
which moves every position by one: `special_tokens=True` does as it does.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int32

from xattn.config import UsageError

PAD, BOS, EOS, MASK, CLS, SEP = range(6)
OFFSET = 6
VOCAB_SIZE = OFFSET + 256


def encode(text: str | bytes, length: int | None = None, special_tokens: bool = False) -> Int32[np.ndarray, "M"]:
    """The tokens of a text, filled up with PAD.

    Args:
      text: a string, taken as UTF-8, or bytes as they are.
      length: M; without it, as many as there are.
      special_tokens: put CLS before and SEP after the bytes.

    Raises:
      UsageError: the text has more tokens than `length`.
    """
    data = text.encode() if isinstance(text, str) else text
    tokens = np.frombuffer(data, np.uint8).astype(np.int32) + OFFSET
    if special_tokens:
        tokens = np.concatenate([[CLS], tokens, [SEP]]).astype(np.int32)
    if length is None:
        return tokens
    if len(tokens) > length:
        raise UsageError(f"the text has {len(tokens)} tokens, but only {length} fit: shorten it.")
    return np.pad(tokens, (0, length - len(tokens)), constant_values=PAD)


def decode(tokens: Int[np.ndarray, "M"] | Sequence[int]) -> str:
    """The text of the tokens; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
    return bytes(token - OFFSET for token in map(int, tokens) if token >= OFFSET).decode(errors="replace")
