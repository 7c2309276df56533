"""The stream of training batches, built with grain.

Batch k holds the episodes k B .. (k + 1) B - 1, whatever the number of hosts: the position is the step,
so a run resumes by naming the step, and nothing of the pipeline is saved.
"""

from collections.abc import Iterator

import grain
import jax
import numpy as np

from xattn.config import UsageError
from xattn.data.episodes import EpisodeSampler, ImageSource

_FOREVER = 2**62  # grain counts batches with rounding up, which must stay below sys.maxsize


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
      process_index, process_count: host p of n takes every n-th episode, starting with its p-th.
      num_threads: threads that read images ahead; 0 reads in the caller's thread.

    Yields:
      dicts of support uint8 [B/n, N, K, H, W, C], query uint8 [B/n, N Q, H, W, C] and
      query_labels int32 [B/n, N Q]; row q of query belongs to support row q mod N.

    Raises:
      UsageError: the batch does not divide over the hosts, or `EpisodeSampler` refuses.
    """
    if batch_size % process_count:
        raise UsageError(
            f"A batch of {batch_size} episodes does not divide over {process_count} hosts: "
            f"use a multiple of {process_count}."
        )
    sampler = EpisodeSampler(source, seed, ways, shots, queries, mode)

    def load(episode: int) -> dict[str, np.ndarray]:
        drawn = sampler(episode)
        return {
            "support": source.images(drawn["support"], drawn["support_seeds"]),
            "query": source.images(drawn["query"], drawn["query_seeds"]),
            "query_labels": drawn["query_labels"],
        }

    stop = _FOREVER if num_steps is None else (start_step + num_steps) * batch_size
    episodes = grain.MapDataset.range(start_step * batch_size, stop)
    dataset = episodes.map(load)[process_index::process_count].batch(batch_size // process_count)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(dataset.to_iter_dataset(options))


def episode_shapes(
    *, image_shape: tuple[int, int, int], ways: int, shots: int, queries: int, batch_size: int, **_: object
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `episode_batches` yields on one host, for images of shape [H, W, C]."""
    return {
        "support": jax.ShapeDtypeStruct((batch_size, ways, shots, *image_shape), np.uint8),
        "query": jax.ShapeDtypeStruct((batch_size, ways * queries, *image_shape), np.uint8),
        "query_labels": jax.ShapeDtypeStruct((batch_size, ways * queries), np.int32),
    }
