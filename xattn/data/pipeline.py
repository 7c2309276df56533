"""The streams of batches, built with grain: episodes for few-shot learning, examples for everything else.

Batch k holds the episodes, or the examples, at the positions k B .. (k + 1) B - 1, whatever the number of
hosts: the position is the step, so a run resumes by naming the step, and nothing of the pipeline is saved.

Position p of a stream of examples lies in epoch e = p // n of a source with n examples. It holds example
order_e[(p mod n) // r], where order_e is a permutation drawn from `default_rng([seed, e])` and r says how often an
example is repeated (once, if not told otherwise); what is random about the example (its crop, which of its words are
masked) comes from `SeedSequence([seed, p])`.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np

from xattn.config import UsageError, check_options, lookup
from xattn.data.episodes import EpisodeSampler, ImageSource
from xattn.data.mask_words import mask_words
from xattn.data.mixing import mixup_cutmix, mixup_or_cutmix
from xattn.data.random_erasing import random_erasing

_FOREVER = 2**62  # grain counts batches with rounding up, which must stay below sys.maxsize

# What can be done to a batch, in the order in which it is done. Each takes the batch and a seed for every row.
TRANSFORMS = {
    "mask_words": mask_words,
    "random_erasing": random_erasing,
    "mixup_cutmix": mixup_cutmix,
    "mixup_or_cutmix": mixup_or_cutmix,
}


@runtime_checkable
class ExampleSource(Protocol):
    """What a stream of examples needs of a data set.

    `example(index, seed)` returns the fields of one example; an integer asks a source that augments for its
    training transform, drawn from that seed, and None for the evaluation transform. The classmethod
    `shapes(**options)` tells the fields for the constructor's keywords without opening the data.
    """

    name: str
    split: str
    num_examples: int

    def example(self, index: int, seed: int | None) -> dict[str, np.ndarray]: ...

    @classmethod
    def shapes(cls, **options: Any) -> dict[str, jax.ShapeDtypeStruct]: ...


def episode_batches(
    source: ImageSource,
    *,
    seed: int,
    ways: int,
    shots: int,
    queries: int,
    batch_size: int,
    start_step: int = 0,
    num_steps: int | None = None,
    mode: str = "mixed",
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over batches of episodes, from step `start_step` on.

    Args:
      source: the data set.
      seed, ways, shots, queries, mode: see `EpisodeSampler`.
      batch_size: B, the episodes of a step on all hosts together.
      start_step, num_steps: the first step and how many follow (without end by default).
      process_index, process_count: host p of n takes the p-th of n equal parts of every batch.
      num_threads: threads that read images ahead; 0 reads in the caller's thread.

    Yields:
      dicts of support uint8 [B/n, N, K, H, W, C], query uint8 [B/n, N Q, H, W, C] and
      query_labels int32 [B/n, N Q]; row q of query belongs to support row q mod N.

    Raises:
      UsageError: the batch does not divide over the hosts, or `EpisodeSampler` refuses.
    """
    _check_hosts(batch_size, process_count, "episodes")
    sampler = EpisodeSampler(source, seed, ways, shots, queries, mode)

    share = batch_size // process_count

    def load(place: int) -> dict[str, np.ndarray]:
        step, row = divmod(place, share)
        drawn = sampler(step * batch_size + process_index * share + row)
        return {
            "support": source.images(drawn["support"], drawn["support_seeds"]),
            "query": source.images(drawn["query"], drawn["query_seeds"]),
            "query_labels": drawn["query_labels"],
        }

    stop = _FOREVER if num_steps is None else (start_step + num_steps) * share
    return _read(grain.MapDataset.range(start_step * share, stop).map(load).batch(share), num_threads)


def episode_shapes(
    example: Mapping[str, jax.ShapeDtypeStruct], *, ways: int, shots: int, queries: int, batch_size: int, **_: object
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `episode_batches` yields on one host, for images like `example["image"]`."""
    image = example["image"].shape
    return {
        "support": jax.ShapeDtypeStruct((batch_size, ways, shots, *image), np.uint8),
        "query": jax.ShapeDtypeStruct((batch_size, ways * queries, *image), np.uint8),
        "query_labels": jax.ShapeDtypeStruct((batch_size, ways * queries), np.int32),
    }


def example_batches(
    source: ExampleSource,
    *,
    seed: int,
    batch_size: int,
    transforms: Mapping[str, Mapping[str, Any]] = {},
    repeats: int = 1,
    start_step: int = 0,
    num_steps: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over batches of augmented examples, every epoch in an order of its own, from `start_step` on.

    Args:
      source: the data set.
      seed: of the orders and of all that is random about the examples.
      batch_size: B, the examples of a step on all hosts together; batches run on over the end of an epoch.
      transforms: name in `TRANSFORMS` -> its keywords; applied in the table's order.
      repeats: r, how often an example comes in a row, each time augmented anew (repeated augmentation, arXiv
        1902.05509). An epoch keeps its n positions, so it shows ceil(n / r) of the examples.
      start_step, num_steps: the first step and how many follow (without end by default).
      process_index, process_count: host p of n takes the p-th of n equal parts of every batch.
      num_threads: threads that read batches ahead; 0 reads in the caller's thread.

    Yields:
      dicts of the source's fields and those of the transforms, stacked: [B/n, ...].

    Raises:
      UsageError: the batch does not divide over the hosts, the seed is negative, there are fewer than 1 repeats, or a
        transform or its keyword does not exist or does not fit the source's fields.
    """
    _check_hosts(batch_size, process_count, "examples")
    if seed < 0:
        raise UsageError(f"A stream of examples needs a seed of at least 0, but got {seed}.")
    if repeats < 1:
        raise UsageError(f"A stream of examples needs repeats of at least 1, but got {repeats}.")
    transform = _transform(transforms)
    share = batch_size // process_count

    # Two, because the threads that read ahead pass from one epoch to the next at different moments.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(source.num_examples)

    def index(position: int) -> int:
        epoch, place = divmod(position, source.num_examples)
        return int(order(epoch)[place // repeats])

    def load(step: int) -> dict[str, np.ndarray]:
        begin = step * batch_size + process_index * share
        positions = range(begin, begin + share)
        seeds = np.stack([_seeds(seed, position) for position in positions])
        examples = (
            source.example(index(position), int(own)) for position, own in zip(positions, seeds[:, 0], strict=True)
        )
        return transform(_stack(examples, len(seeds)), seeds[:, 1])

    stop = _FOREVER if num_steps is None else start_step + num_steps
    return _read(grain.MapDataset.range(start_step, stop).map(load), num_threads)


def eval_batches(
    source: ExampleSource,
    batch_size: int,
    transforms: Mapping[str, Mapping[str, Any]] = {},
    seed: int = 0,
    num_examples: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = min(16, os.cpu_count() or 2),
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates once over examples of a source, in order and with the evaluation transform.

    Args:
      source: the data set.
      batch_size: B; the last batch is filled up with its last example, so that all have one shape.
      transforms: name in `TRANSFORMS` -> its keywords.
      seed: of the transforms; what happens to an example depends on (seed, index), not on the batch size.
      num_examples: k, how many; all n by default. Fewer are spread evenly over the source, which may list its
        classes one after the other: they are the examples floor(i n / k) for i = 0 .. k - 1.
      process_index, process_count: host p of h takes the p-th of h equal parts of every batch.
      num_threads: threads that read batches ahead.

    Yields:
      dicts like those of `example_batches` with the further field present bool [B/h], False in rows that fill up.

    Raises:
      UsageError: more examples are asked for than there are, or fewer than one, or the batch does not divide over the
        hosts.
    """
    _check_hosts(batch_size, process_count, "examples")
    share = batch_size // process_count
    total = source.num_examples if num_examples is None else num_examples
    if not 0 < total <= source.num_examples:
        raise UsageError(
            f"{source.name} ({source.split}) has {source.num_examples} examples, but {total} were asked for: "
            f"ask for 1 to {source.num_examples}."
        )
    transform = _transform(transforms)

    def load(batch: int) -> dict[str, np.ndarray]:
        rows = batch * batch_size + process_index * share + np.arange(share)
        indices = np.minimum(rows, total - 1) * source.num_examples // total
        seeds = np.stack([_seeds(seed, int(index))[1] for index in indices])
        examples = {index: source.example(int(index), None) for index in np.unique(indices)}
        return transform(_stack((examples[index] for index in indices), share), seeds) | {"present": rows < total}

    return _read(grain.MapDataset.range(-(-total // batch_size)).map(load), num_threads)


def example_shapes(
    example: Mapping[str, jax.ShapeDtypeStruct],
    *,
    batch_size: int,
    transforms: Mapping[str, Mapping[str, Any]] = {},
    **_: object,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `example_batches` yields on one host, for examples of the given shapes."""
    # The transforms tell their fields by being applied to two rows of zeros.
    rows = {name: np.zeros((2, *field.shape), field.dtype) for name, field in example.items()}
    batch = _transform(transforms)(rows, np.zeros(2, np.uint32))
    return {name: jax.ShapeDtypeStruct((batch_size, *rows.shape[1:]), rows.dtype) for name, rows in batch.items()}


def _transform(transforms: Mapping[str, Mapping[str, Any]]) -> Callable[[Any, np.ndarray], dict[str, np.ndarray]]:
    """The transforms as one function of a batch and the seeds of its rows."""
    for name, options in transforms.items():
        function = lookup(TRANSFORMS, name, "transform")
        check_options(options, function, f"config.pipeline.transforms.{name}", given=("batch", "seeds"))

    def apply(batch: dict[str, np.ndarray], seeds: np.ndarray) -> dict[str, np.ndarray]:
        for name in TRANSFORMS:
            if name in transforms:
                batch = TRANSFORMS[name](batch, seeds, **transforms[name])
        return batch

    return apply


def _seeds(seed: int, position: int) -> np.ndarray:
    """uint32 [2]: the seeds of the example at a position and of what transforms do to it."""
    return np.random.SeedSequence([seed, position]).generate_state(2)


def _stack(examples: Iterable[dict[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """The examples as rows of a batch. Each is copied as it comes, so that its memory can serve the next one."""
    batch: dict[str, np.ndarray] = {}
    for row, example in enumerate(examples):
        batch = batch or {name: np.empty((count, *field.shape), field.dtype) for name, field in example.items()}
        for name, rows in batch.items():
            if rows.shape[1:] != example[name].shape:  # an axis of length 1 would be spread out
                raise ValueError(f"example {row} of a batch has {name} {example[name].shape}, not {rows.shape[1:]}")
            rows[row] = example[name]
    return batch


def _read(dataset: grain.MapDataset, num_threads: int) -> Iterator[dict[str, np.ndarray]]:
    if num_threads < 0:
        raise UsageError(f"A stream of batches needs num_threads of at least 0, but got {num_threads}.")
    # A thread makes a whole batch, and the buffer holds those that are being made: large ones fill the memory.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 1)
    return iter(dataset.to_iter_dataset(options))


def _check_hosts(batch_size: int, process_count: int, what: str) -> None:
    if batch_size % process_count:
        raise UsageError(
            f"A batch of {batch_size} {what} does not divide over {process_count} hosts: "
            f"use a multiple of {process_count}."
        )
