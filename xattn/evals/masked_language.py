"""How well a model guesses hidden bytes, beside a guess that does not look at the text."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array

from xattn import data, tasks
from xattn.config import Config, UsageError, from_json, to_json
from xattn.evals.examples import check_examples, examples_id, on_replicas, open_split, score_examples
from xattn.evals.fewshot import half_width


def masked_language(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: Config,
    /,
    *,
    split: str = "test",
    num_examples: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy and bits per byte on the hidden bytes of `num_examples` texts of a split.

    Args:
      model, variables, config: what `xattn.load` gives; what is hidden, and how, is that of the training
        (`config.pipeline.transforms`).
      split: of the data set of `config.data`.
      num_examples: how many, spread evenly over the split, or None for all.
      batch_size: texts in a call.
      seed: of what is hidden.

    Returns:
      A dict of `accuracy` on hidden bytes; `bits_per_byte`, their mean cross-entropy to base 2; `unigram_accuracy` of
      always guessing the byte that is hidden most often in (10,000 examples of) the training split; all of them means
      over the hidden bytes of all texts. `ci95`, the half width of the 95% interval of `accuracy` over texts;
      `per_example`, what each text adds to it: its rightly guessed bytes over the mean number of hidden ones; and the
      `examples` they belong to.

    Raises:
      UsageError: see `check_masked_language`.
    """
    check_masked_language(model, config, split, num_examples, batch_size)
    source = open_split(config, split)
    transforms = config.pipeline.transforms.to_dict()
    task = tasks.build(config.task.to_dict())
    favourite = _favourite(to_json(config.data), to_json(config.pipeline.transforms), batch_size, seed)

    def score(batch: dict[str, np.ndarray]) -> dict[str, Array]:
        return _score(model, task, variables, favourite, on_replicas(batch))

    rows = score_examples(score, source, batch_size, num_examples, transforms, seed)
    hidden = rows["hidden"]
    if not hidden.any():
        raise UsageError(f"not a byte of the {len(hidden)} texts of '{split}' is hidden: is there nothing but space?")
    mean = {name: values.sum() / hidden.sum() for name, values in rows.items()}
    # A ratio of two means: what its interval depends on is how far each text is from the ratio.
    residuals = (rows["right"] - mean["right"] * hidden) / hidden.mean()
    return {
        "metric": "accuracy",
        "accuracy": float(mean["right"]),
        "ci95": half_width(residuals),
        "bits_per_byte": float(mean["bits"]),
        "unigram_accuracy": float(mean["unigram"]),
        "examples": examples_id(config, split, hidden, transforms=transforms, seed=seed),
        "per_example": [round(float(value), 6) for value in rows["right"] / hidden.mean()],
    }


def check_masked_language(
    model: nn.Module,
    config: Config,
    split: str = "test",
    num_examples: int | None = None,
    batch_size: int = 32,
    **_: Any,
) -> None:
    """Raises `UsageError` for another task, split or number, or where nothing hides bytes."""
    del model
    check_examples(config, "masked_language", split, num_examples, batch_size)
    if "mask_words" not in config.pipeline.get("transforms", {}):
        raise UsageError("config.pipeline.transforms has no 'mask_words', so no byte is hidden: add it.")


def describe_masked_language(result: Mapping[str, Any]) -> str:
    """The unigram guess and the bits per byte."""
    unigram = result["unigram_accuracy"]
    times = f" (x {result['accuracy'] / unigram:.2f})" if unigram else ""
    return f"unigram guess {100 * unigram:.2f}{times}, {result['bits_per_byte']:.2f} bits a byte"


@functools.cache
def _favourite(config: str, transforms: str, batch_size: int, seed: int) -> int:
    """The byte that is hidden most often in the training split; `config` of the data and `transforms` are JSON."""
    train = data.build(from_json(config).to_dict(), split="train")
    batches = data.eval_batches(
        train, batch_size, from_json(transforms).to_dict(), seed, min(10_000, train.num_examples)
    )
    hidden = [batch["targets"][batch["loss_mask"] & batch["present"][:, None]] for batch in batches]
    return int(np.bincount(np.concatenate(hidden), minlength=1).argmax())


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    model: nn.Module, task: Any, variables: Mapping[str, Any], favourite: Array, batch: Mapping[str, Array]
) -> dict[str, Array]:
    """Sums over the hidden bytes of each text."""
    logits: Any = model.apply(variables, *task.inputs(batch))
    targets, hidden = batch["targets"], batch["loss_mask"]
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets) / jnp.log(2)
    values = {"right": logits.argmax(-1) == targets, "bits": entropy, "unigram": targets == favourite, "hidden": 1}
    return {name: jnp.sum(jnp.where(hidden, value, 0), -1) for name, value in values.items()}
