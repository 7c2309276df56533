"""A source whose pixels say which image and which seed they come from."""

import dataclasses

import numpy as np
import pytest


@dataclasses.dataclass
class FakeSource:
    labels: np.ndarray
    groups: np.ndarray | None = None
    split: str = "train"
    name: str = "fake"
    image_shape: tuple[int, int, int] = (1, 2, 8)

    def __post_init__(self):
        self.labels = np.asarray(self.labels, np.int32)
        self.num_images = len(self.labels)
        self.class_names = [f"class{label}" for label in range(self.labels.max() + 1)]

    def images(self, indices, seeds=None):
        """uint8 [..., 1, 2, 8]: the eight bytes of the index over the eight bytes of the seed."""
        seeds = np.full_like(indices, -1) if seeds is None else seeds
        pairs = np.stack([indices, seeds], -1).astype(np.int64)
        return np.ascontiguousarray(pairs).view(np.uint8).reshape(*np.shape(indices), 1, 2, 8)

    @staticmethod
    def read(images):
        """The (indices, seeds) that the pixels hold."""
        pairs = np.ascontiguousarray(images).view(np.int64)
        return pairs[..., 0, 0, 0], pairs[..., 0, 1, 0]


@pytest.fixture
def fake_source():
    return FakeSource


@pytest.fixture
def shuffled_source():
    """Makes a source whose labels and groups lie in random order."""

    def make(num_classes=7, per_class=9, num_groups=3, split="train"):
        rng = np.random.default_rng(0)
        labels = rng.permutation(np.repeat(np.arange(num_classes), per_class))
        return FakeSource(labels, rng.integers(num_groups, size=len(labels)).astype(np.int32), split)

    return make
