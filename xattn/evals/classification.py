"""Top-1 and top-5 accuracy over the examples of a split."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from xattn import tasks
from xattn.config import Config, UsageError
from xattn.evals.examples import check_examples, examples_id, on_replicas, open_split, score_examples
from xattn.evals.fewshot import half_width


def classification(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: Config,
    /,
    *,
    split: str = "test",
    num_examples: int | None = None,
    batch_size: int = 100,
) -> dict[str, Any]:
    """Accuracy on `num_examples` of a split.

    Args:
      model, variables, config: what `xattn.load` gives; the model maps images [B, H, W, C] to logits [B, K].
      split: of the data set of `config.data`.
      num_examples: how many, spread evenly over the split, or None for all.
      batch_size: examples in a call; it does not change the result.

    Returns:
      A dict of `accuracy` (the true class has the largest logit) and `top5` (it is among the five largest), means over
      examples in [0, 1]; `ci95`, the half width of the 95% interval of `accuracy`; `per_example` 0 or 1, and the
      `examples` they belong to.

    Raises:
      UsageError: see `check_classification`.
    """
    check_classification(model, config, split, num_examples, batch_size)
    source = open_split(config, split)
    task = tasks.build(config.task.to_dict())

    def score(batch: dict[str, np.ndarray]) -> dict[str, Array]:
        return _rank(model, task, variables, on_replicas(batch))

    ranks = score_examples(score, source, batch_size, num_examples)["rank"]
    right = (ranks == 0).astype(float)
    return {
        "metric": "accuracy",
        "accuracy": float(right.mean()),
        "ci95": half_width(right),
        "top5": float((ranks < 5).mean()),
        "examples": examples_id(config, split, right),
        "per_example": right.tolist(),
    }


def check_classification(
    model: nn.Module, config: Config, split: str = "test", num_examples: int | None = None, batch_size: int = 100
) -> None:
    """Raises `UsageError` for another task, split or number, or more classes than the model has."""
    check_examples(config, "classification", split, num_examples, batch_size)
    source = open_split(config, split)
    outputs = _num_outputs(model, tasks.build(config.task.to_dict()), source.example(0, None)["image"].shape)
    if outputs < len(source.class_names):
        raise UsageError(
            f"the model has {outputs} outputs, but {source.name} has {len(source.class_names)} classes: "
            "give it one output for each."
        )


def describe_classification(result: Mapping[str, Any]) -> str:
    """The top-5 accuracy."""
    return f"top-5 {100 * result['top5']:.2f}"


@functools.cache
def _num_outputs(model: nn.Module, task: Any, image_shape: tuple[int, ...]) -> int:
    batch = {"image": jnp.zeros((1, *image_shape), jnp.uint8)}
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    logits, _ = jax.eval_shape(lambda batch: model.init_with_output(rngs, *task.inputs(batch)), batch)
    return logits.shape[-1]


# Compiled once for a model, however often a run validates.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _rank(model: nn.Module, task: Any, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
    """How many classes come before the true one: a larger logit, one that is no number, an equal one further left."""
    logits: Any = model.apply(variables, *task.inputs(batch))
    true = jnp.take_along_axis(logits, batch["label"][:, None], -1)
    earlier = jnp.arange(logits.shape[-1]) < batch["label"][:, None]
    return {"rank": jnp.sum(~(logits <= true) | ((logits == true) & earlier), -1)}
