"""Few-shot episodes: which images make episode number e of a source.

An episode draws N classes (ways) and, of each, K support images (shots) and Q other images as queries.
Episode e is a pure function of (seed, split, mode, N, K, Q, e): nothing is carried from one episode to
the next, so a run resumes at any episode, and hosts can share the episodes out, without saved state.

Query rows are interleaved, c0 c1 ... c(N-1) c0 c1 ...: their labels are `tile(arange(N), Q)`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from xattn.config import UsageError

SPLITS = ("train", "val", "test")
MODES = ("mixed", "cross_family")


@runtime_checkable
class ImageSource(Protocol):
    """What episodes need of a data set.

    `labels` [n] index `class_names`; `groups` [n] names a second property of each image (the font family
    of a glyph) or is None. `images(indices, seeds)` returns uint8 images; `seeds`, one an image, ask a
    source that augments for its training transform, and None for the evaluation transform.
    """

    name: str
    split: str
    num_images: int
    class_names: list[str]
    labels: np.ndarray
    groups: np.ndarray | None
    image_shape: tuple[int, int, int]

    def images(
        self, indices: Int[np.ndarray, "*A"], seeds: Int[np.ndarray, "*A"] | None = None
    ) -> UInt8[np.ndarray, "*A H W C"]: ...


@dataclasses.dataclass(frozen=True)
class EpisodeSampler:
    """Draws episodes of a source by their number.

    Attributes:
      source: the data set.
      seed: of the whole sequence of episodes.
      ways, shots, queries: N, K and Q (queries of each class).
      mode: "mixed" draws support and queries from all images of a class. "cross_family" draws the support
        of a class from one group (font family) and its queries from the other groups, and leaves out the
        classes that don't have enough images for that.

    Raises:
      UsageError: a size is below 1, the mode is unknown or not possible for the source, a class has fewer
        than K + Q images, or there are fewer than N classes.
    """

    source: ImageSource
    seed: int
    ways: int
    shots: int
    queries: int
    mode: str = "mixed"

    def __post_init__(self):
        where = f"{self.source.name} ({self.source.split})"
        for name in ("ways", "shots", "queries"):
            if getattr(self, name) < 1:
                raise UsageError(f"Episodes need {name} of at least 1, but got {getattr(self, name)}.")
        if self.seed < 0:
            raise UsageError(f"Episodes need a seed of at least 0, but got {self.seed}.")
        if self.mode not in MODES:
            raise UsageError(f"There is no episode mode '{self.mode}': choose one of {', '.join(MODES)}.")
        if self.mode == "cross_family" and self.source.groups is None:
            raise UsageError(f"{where} has no groups of images, which cross_family needs: use mode='mixed'.")
        if len(self._classes) < self.ways:
            raise UsageError(
                f"{where} has {len(self._classes)} classes for {self.mode} episodes, but {self.ways} ways "
                f"were asked for: ask for {len(self._classes)} or fewer."
            )

    def __call__(self, episode: int) -> dict[str, np.ndarray]:
        """Episode number `episode` as indices into the source.

        Returns:
          classes [N]: the labels that the source gives to the N classes; support [N, K]; query [N Q];
          query_labels [N Q], int32 in 0..N-1; support_seeds and query_seeds, for augmentation, in the
          shapes of support and query.
        """
        split = SPLITS.index(self.source.split)
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed * 4 + split, episode], np.uint64)))
        chosen = rng.choice(len(self._classes), self.ways, replace=False)
        size = self.shots + self.queries
        rows = np.stack([self._draw(rng, self._classes[c][1]) for c in chosen])
        seeds = rng.integers(2**31, size=self.ways * size).reshape(self.ways, size)
        return {
            "classes": np.array([self._classes[c][0] for c in chosen], np.int32),
            "support": rows[:, : self.shots],
            "query": rows[:, self.shots :].T.ravel(),
            "query_labels": np.tile(np.arange(self.ways, dtype=np.int32), self.queries),
            "support_seeds": seeds[:, : self.shots],
            "query_seeds": seeds[:, self.shots :].T.ravel(),
        }

    def _draw(self, rng: np.random.Generator, pools: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
        """K support and Q query images of one class."""
        if self.mode == "mixed":
            (members,) = pools[0]
            return members[rng.permutation(len(members))[: self.shots + self.queries]]
        support, query = pools[int(rng.integers(len(pools)))]
        support = support[rng.permutation(len(support))[: self.shots]]
        query = query[rng.permutation(len(query))[: self.queries]]
        return np.concatenate([support, query])

    @functools.cached_property
    def _classes(self) -> list[tuple[int, list[tuple[np.ndarray, ...]]]]:
        """(label, pools) of every class that can appear; a pool holds what one draw chooses from."""
        source = self.source
        order = np.argsort(source.labels, kind="stable")
        ends = np.searchsorted(source.labels[order], np.arange(1, len(source.class_names)))
        classes = []
        for label, members in enumerate(np.split(order, ends)):
            if len(members) < self.shots + self.queries:
                raise UsageError(
                    f"Class '{source.class_names[label]}' of {source.name} ({source.split}) has "
                    f"{len(members)} images, but {self.shots} shots and {self.queries} queries need "
                    f"{self.shots + self.queries}: lower the shots or the queries, or leave the class out."
                )
            if self.mode == "mixed" or source.groups is None:
                classes.append((label, [(members,)]))
                continue
            groups = source.groups[members]
            pools = [(members[groups == group], members[groups != group]) for group in np.unique(groups)]
            pools = [pool for pool in pools if len(pool[0]) >= self.shots and len(pool[1]) >= self.queries]
            if pools:
                classes.append((label, pools))
        return classes


def fixed_episodes(
    source: ImageSource,
    *,
    seed: int,
    ways: int,
    shots: int,
    queries: int,
    num_episodes: int,
    mode: str = "mixed",
) -> dict[str, np.ndarray]:
    """Episodes 0..E-1 as stacked index arrays, to classify with features that were computed once.

    Every method that is evaluated with the same arguments sees the same episodes, so differences between
    methods can be tested pair by pair.

    Returns:
      support [E, N, K], query [E, N Q], query_labels [E, N Q], classes [E, N].
    """
    sampler = EpisodeSampler(source, seed, ways, shots, queries, mode)
    episodes = [sampler(e) for e in range(num_episodes)]
    return {
        name: np.stack([episode[name] for episode in episodes])
        for name in ("support", "query", "query_labels", "classes")
    }
