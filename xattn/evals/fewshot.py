"""Few-shot accuracy over fixed episodes, with its confidence interval.

The images that the episodes use are embedded once; an episode then costs a look-up and the head. All
methods see the same episodes for the same arguments, so two of them can be compared pair by pair.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from jaxtyping import Array, Float, Int

from xattn import data, tasks
from xattn.config import Config, check_keys, lookup
from xattn.parallel.distributed import fetch

METHODS = ("model", "pixel_centroid", "random_features")
BRANCHES = {"global_scores": "global", "local_logits": "local"}


def fewshot(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: Config,
    /,
    *,
    split: str = "test",
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    num_episodes: int = 1000,
    seed: int = 0,
    mode: str = "mixed",
    method: str = "model",
    overrides: Mapping[str, Any] | None = None,
    batch_size: int = 10,
) -> dict[str, Any]:
    """Accuracy of a model, or of a baseline, on `num_episodes` fixed episodes.

    Args:
      model, variables, config: what `xattn.load` gives; the data set and its normalisation come from
        `config.data` and `config.task`.
      split, ways, shots, queries, num_episodes, seed, mode: the episodes; see `xattn.data.episodes`.
      method: "model"; "pixel_centroid", the nearest class mean of raw pixels; or "random_features", the
        nearest class mean of the same model's features before training.
      overrides: constructor keywords of the model to evaluate with, such as
        `{"query_self_attn": "diagonal"}`.
      batch_size: episodes that are classified in one call; it does not change the result.

    Returns:
      A dict of `accuracy` (mean over episodes, in [0, 1]), `ci95` (half width of its 95% interval,
      1.96 std / sqrt(episodes)), `accuracy_<branch>` for models with several branches, `transductive`
      (whether a query's prediction depends on the other queries), the accuracies `per_example`, which is an
      episode here, and the `examples` they belong to.

    Raises:
      UsageError: an unknown method, or episodes that the data set can't give.
    """
    check_fewshot(model, config, split, ways, shots, queries, seed=seed, mode=mode, method=method, overrides=overrides)
    source = data.build(config.data.to_dict(), split=split)
    drawn = {"seed": seed, "ways": ways, "shots": shots, "queries": queries, "num_episodes": num_episodes, "mode": mode}
    episodes = data.fixed_episodes(source, **drawn)
    task = tasks.build(config.task.to_dict())
    model = model.clone(**(overrides or {}))
    if method == "random_features":
        variables = untrained(model, task, source, config.seed)
    if method == "model" and not getattr(model, "independent_features", True):
        correct = _whole_episodes(model, variables, task, source, episodes)
    else:
        used = np.unique(np.concatenate([episodes["support"].ravel(), episodes["query"].ravel()]))
        features = (
            task.prepare(jnp.asarray(source.images(used)))
            if method == "pixel_centroid"
            else embed(model, variables, task, source, used)
        )
        classify = functools.partial(_classify, model, variables) if method == "model" else jax.jit(nearest_centroid)
        correct = _from_features(classify, np.asarray(features), used, episodes, batch_size)
    accuracy = {name: rows.mean(1) for name, rows in correct.items()}
    main = accuracy.pop("logits")
    return {
        "metric": "accuracy",
        "accuracy": float(main.mean()),
        "ci95": half_width(main),
        **{f"accuracy_{BRANCHES[name]}": float(rows.mean()) for name, rows in accuracy.items()},
        "transductive": method == "model" and bool(getattr(model, "transductive", False)),
        "examples": {"data": config.data.to_dict(), "split": split, **drawn},
        "per_example": [round(float(value), 6) for value in main],
    }


def check_fewshot(
    model: nn.Module,
    config: Config,
    split: str = "test",
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    *,
    seed: int = 0,
    mode: str = "mixed",
    method: str = "model",
    overrides: Mapping[str, Any] | None = None,
    **_: Any,
) -> None:
    """Raises `UsageError` for what `fewshot` would refuse: method, overrides, or episodes that the data can't give."""
    lookup(dict.fromkeys(METHODS), method, "few-shot method")
    check_keys(overrides or {}, type(model), "overrides")
    data.EpisodeSampler(data.build(config.data.to_dict(), split=split), seed, ways, shots, queries, mode)


def describe_fewshot(result: Mapping[str, Any]) -> str:
    """Whether the result is transductive, and the accuracies of the model's branches."""
    branches = [
        f"{name.removeprefix('accuracy_')} {100 * value:.2f}"
        for name, value in result.items()
        if name.startswith("accuracy_")
    ]
    return ", ".join(["transductive" if result["transductive"] else "inductive", *branches])


def half_width(values: Float[np.ndarray, "E"]) -> float:
    """Half the width of the 95% interval of a mean over episodes: 1.96 std (ddof 0) / sqrt(E)."""
    return float(1.96 * values.std() / np.sqrt(len(values)))


def untrained(model: nn.Module, task: Any, source: data.ImageSource, seed: int = 0) -> dict[str, Any]:
    """The variables from which training with `seed` starts."""
    images = jnp.zeros((1, 1, 1, *source.image_shape), jnp.uint8)
    batch = {"support": images, "query": images[:, 0]}
    params, dropout = jax.random.split(jax.random.key(seed))
    rngs = {"params": params, "dropout": dropout}
    return meta.unbox(jax.jit(lambda: model.init(rngs, *task.inputs(batch)))())


def embed(
    model: nn.Module,
    variables: Mapping[str, Any],
    task: Any,
    source: data.ImageSource,
    indices: Int[np.ndarray, "n"],
    batch_size: int = 200,
) -> Float[np.ndarray, "n h w C"]:
    """Features of images in evaluation mode, computed in batches of one shape."""
    rows = []
    for start in range(0, len(indices), batch_size):
        chunk = indices[start : start + batch_size]
        padded = np.pad(chunk, (0, batch_size - len(chunk)), mode="edge")
        rows.append(fetch(_features(model, task, variables, source.images(padded)))[: len(chunk)])
    return np.concatenate(rows)


def nearest_centroid(
    support: Float[Array, "*B N K h w C"], query: Float[Array, "*B Q h w C"]
) -> dict[str, Float[Array, "*B Q N"]]:
    """Minus the squared distance of a query to the mean of each class."""
    prototypes = support.mean(-4).reshape(*support.shape[:-4], -1)
    query = query.reshape(*query.shape[:-3], -1)
    return {"logits": -jnp.sum((query[..., :, None, :] - prototypes[..., None, :, :]) ** 2, -1)}


# Compiled once for a model, however often a run validates.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _features(model: nn.Module, task: Any, variables: Mapping[str, Any], images: Any) -> Any:
    return model.apply(variables, task.prepare(images), method="features")


@functools.partial(jax.jit, static_argnums=0)
def _classify(model: nn.Module, variables: Mapping[str, Any], support: Any, query: Any) -> Any:
    return model.apply(variables, support, query, method="classify")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _episode(model: nn.Module, task: Any, variables: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
    return model.apply(variables, *task.inputs(batch))


def _from_features(
    classify: Any, features: np.ndarray, used: np.ndarray, episodes: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, np.ndarray]:
    total = len(episodes["query"])
    correct: dict[str, list[np.ndarray]] = {}
    for start in range(0, total, batch_size):
        # The last batch is filled up with its last episode, so that one shape is compiled.
        rows = np.minimum(np.arange(start, start + batch_size), total - 1)
        support, query = (features[np.searchsorted(used, episodes[part][rows])] for part in ("support", "query"))
        _count(correct, classify(support, query), episodes["query_labels"][rows], total - start)
    return {name: np.concatenate(parts) for name, parts in correct.items()}


def _whole_episodes(
    model: nn.Module,
    variables: Mapping[str, Any],
    task: Any,
    source: data.ImageSource,
    episodes: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    correct: dict[str, list[np.ndarray]] = {}
    for support, query, labels in zip(episodes["support"], episodes["query"], episodes["query_labels"], strict=True):
        batch = {"support": source.images(support[None]), "query": source.images(query[None])}
        _count(correct, _episode(model, task, variables, batch), labels[None], 1)
    return {name: np.concatenate(parts) for name, parts in correct.items()}


def _count(correct: dict[str, list[np.ndarray]], outputs: Mapping[str, Any], labels: np.ndarray, keep: int) -> None:
    for name in ("logits", *BRANCHES):
        if name in outputs:
            hits = fetch(outputs[name]).argmax(-1) == labels
            correct.setdefault(name, []).append(hits[:keep])
