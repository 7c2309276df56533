"""Whole-word masking of bytes: a batch of token ids becomes a masked-language-modelling batch.

A word is a longest run of bytes that are not white space (ASCII 9..13 and 32); special tokens are not part of
words. Of the n words of a row, floor(rate n + 1/2) and at least one are drawn without replacement, and every
byte of a drawn word becomes MASK. Words differ in length, so the fraction of masked bytes is only near the
rate. A window that begins or ends inside a word has a part of that word as a word.

Source: the training of the language model of Perceiver IO (arXiv 2107.14795). The released code does not contain it:
masking whole words, 15% of them, is written from memory of the paper, and the details above are this module's own.
"""

import numpy as np
from jaxtyping import Shaped

from xattn.config import UsageError
from xattn.data.byte_tokenizer import MASK, OFFSET, PAD

_SPACES = np.array([OFFSET + byte for byte in b"\t\n\v\f\r "])


def mask_words(
    batch: dict[str, np.ndarray], seeds: Shaped[np.ndarray, "B"], /, *, rate: float = 0.15
) -> dict[str, np.ndarray]:
    """Masks whole words.

    Args:
      batch: with tokens int32 [B, M].
      seeds: which words of row i are masked is drawn from `default_rng(seeds[i])`.
      rate: fraction of words.

    Returns:
      The batch with tokens int32 [B, M] (masked), targets int32 [B, M] (as they were), loss_mask bool [B, M]
      (where a byte was replaced) and input_mask bool [B, M] (False at PAD).

    Raises:
      UsageError: the batch has no tokens, or the rate is not in (0, 1].
    """
    if "tokens" not in batch:
        raise UsageError(
            f"mask_words masks tokens, but the data has {', '.join(batch)}: take config.pipeline.transforms.mask_words "
            "away, or choose a source of text."
        )
    if not 0 < rate <= 1:
        raise UsageError(f"mask_words needs a rate above 0 and up to 1, but got {rate}.")
    tokens = batch["tokens"]
    in_word = (tokens >= OFFSET) & ~np.isin(tokens, _SPACES)
    starts = in_word & ~np.pad(in_word, ((0, 0), (1, 0)))[:, :-1]
    number = np.cumsum(starts, axis=1) * in_word  # 1, 2, ... in words, 0 elsewhere
    loss_mask = np.zeros(tokens.shape, bool)
    for row, seed in enumerate(seeds):
        if words := number[row].max(initial=0):
            count = max(1, int(rate * words + 0.5))
            drawn = np.random.default_rng(seed).permutation(words)[:count] + 1
            loss_mask[row] = np.isin(number[row], drawn)
    return batch | {
        "tokens": np.where(loss_mask, MASK, tokens).astype(np.int32),
        "targets": tokens,
        "loss_mask": loss_mask,
        "input_mask": tokens != PAD,
    }
