"""What the protocols over single examples share: scores example by example, and what may be asked for."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from xattn import data
from xattn.config import Config, UsageError, from_json, to_json
from xattn.parallel.distributed import gather
from xattn.parallel.mesh import local_rows, num_replicas, row_share, shard_batch


def score_examples(
    score: Callable[[dict[str, np.ndarray]], Mapping[str, Any]],
    source: Any,
    batch_size: int,
    num_examples: int | None = None,
    transforms: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Shaped[np.ndarray, "E"]]:
    """The values that `score` gives examples of a source that are spread evenly over it.

    A batch grows until the replicas of the current mesh divide it, so that `score` can share it among them
    (`on_replicas`); rows that only fill up are left out of the result. Of several processes each scores its rows of
    every batch, and all have the whole result.

    Args:
      score: a batch of B examples, of which several processes have their rows, to values of these rows by name.
      source, batch_size, num_examples, transforms, seed: see `xattn.data.eval_batches`.
    """
    rows: dict[str, list[np.ndarray]] = {}
    replicas = num_replicas(mesh := jax.sharding.get_mesh())
    index, count = row_share(mesh)
    batches = data.eval_batches(
        source,
        -(-batch_size // replicas) * replicas,
        transforms=transforms or {},
        seed=seed,
        num_examples=num_examples,
        process_index=index,
        process_count=count,
    )
    for batch in batches:
        present = batch.pop("present")
        for name, values in {"present": present, **score(batch)}.items():
            rows.setdefault(name, []).append(local_rows(values))
    # Processes with the same share have the same rows.
    shares = [int(share) for share in gather(np.asarray(index))]
    whole = {}
    for name, parts in rows.items():
        by_share = dict(zip(shares, gather(np.stack(parts)), strict=True))
        whole[name] = np.concatenate([by_share[share] for share in range(count)], axis=1).ravel()
    present = whole.pop("present")
    return {name: values[present] for name, values in whole.items()}


def on_replicas(batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
    """This process's rows of a batch, shared by the replicas of the current mesh if they divide it."""
    mesh = jax.sharding.get_mesh()
    rows = len(next(iter(batch.values()))) * row_share(mesh)[1]
    return shard_batch(batch, mesh) if num_replicas(mesh) > 1 and rows % num_replicas(mesh) == 0 else batch


def check_examples(config: Config, protocol: str, split: str, num_examples: int | None, batch_size: int) -> None:
    """Raises `UsageError` for a task, a split, a number or a batch that `protocol` can't take."""
    if config.task.name != protocol:
        raise UsageError(f"the evaluation '{protocol}' is for the task '{protocol}', but this is '{config.task.name}'.")
    source = open_split(config, split)
    if num_examples is not None and not 0 < num_examples <= source.num_examples:
        raise UsageError(
            f"num_examples is {num_examples}, but the split '{split}' has {source.num_examples}: "
            "give fewer, or None for all."
        )
    if batch_size < 1:
        raise UsageError(f"batch_size of the evaluation '{protocol}' is {batch_size}: give 1 or more.")


def open_split(config: Config, split: str) -> Any:
    """The source of a split of `config.data`; one that a run validates on again and again is opened once."""
    return _open(to_json(config.data), split)


@functools.lru_cache(maxsize=2)
def _open(config: str, split: str) -> Any:
    return data.build(from_json(config).to_dict(), split=split)


def examples_id(config: Config, split: str, per_example: np.ndarray, **more: Any) -> dict[str, Any]:
    """What tells one set of examples from another, so that only results on the same ones are compared in pairs."""
    return {"data": config.data.to_dict(), "split": split, "num_examples": len(per_example), **more}
