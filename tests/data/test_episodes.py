import subprocess
import sys

import numpy as np
import pytest

from xattn.config import UsageError
from xattn.data.episodes import EpisodeSampler, fixed_episodes


def test_an_episode_is_what_the_recipe_gives(shuffled_source):
    """The recipe written down on its own: Philox keyed by (4 seed + split, e), then three kinds of draws."""
    for split_id, split in enumerate(("train", "val", "test")):
        source = shuffled_source(split=split)
        for e in (0, 1, 12345):
            rng = np.random.Generator(np.random.Philox(key=np.array([11 * 4 + split_id, e], np.uint64)))
            classes = rng.choice(7, 4, replace=False)
            support, query = [], []
            for c in classes:
                members = np.flatnonzero(source.labels == c)
                drawn = members[rng.permutation(9)[: 2 + 3]]
                support.append(drawn[:2])
                query.append(drawn[2:])
            seeds = rng.integers(2**31, size=4 * 5).reshape(4, 5)

            episode = EpisodeSampler(source, seed=11, ways=4, shots=2, queries=3)(e)
            np.testing.assert_array_equal(episode["classes"], classes)
            np.testing.assert_array_equal(episode["support"], support)
            np.testing.assert_array_equal(episode["support_seeds"], seeds[:, :2])
            assert episode["query_labels"].tolist() == [0, 1, 2, 3] * 3
            for row in range(12):
                assert episode["query"][row] == query[row % 4][row // 4]
                assert episode["query_seeds"][row] == seeds[row % 4, 2 + row // 4]


@pytest.mark.parametrize("mode", ["mixed", "cross_family"])
def test_support_and_query_hold_different_images_of_the_right_classes(shuffled_source, mode):
    source = shuffled_source()
    sampler = EpisodeSampler(source, seed=0, ways=5, shots=1, queries=3, mode=mode)
    seen = np.zeros(source.num_images, int)
    for e in range(300):
        episode = sampler(e)
        rows = np.concatenate([episode["support"].ravel(), episode["query"]])
        assert len(set(rows)) == len(rows) == 20
        assert len(set(episode["classes"])) == 5
        np.testing.assert_array_equal(source.labels[episode["support"]], episode["classes"][:, None])
        np.testing.assert_array_equal(source.labels[episode["query"]], episode["classes"][episode["query_labels"]])
        if mode == "cross_family":
            own = source.groups[episode["support"]][episode["query_labels"], 0]
            assert (source.groups[episode["query"]] != own).all()
        seen[rows] += 1
    if mode == "mixed":  # 300 * 20 draws over 63 images that are equally likely
        assert abs(seen - 300 * 20 / 63).max() < 5 * np.sqrt(300 * 20 / 63)
    assert seen.min() > 0


def test_cross_family_support_comes_from_one_family(shuffled_source):
    source = shuffled_source(per_class=30)
    sampler = EpisodeSampler(source, seed=0, ways=5, shots=4, queries=5, mode="cross_family")
    used = set()
    for e in range(50):
        groups = source.groups[sampler(e)["support"]]
        assert (groups == groups[:, :1]).all()
        used |= set(groups.ravel().tolist())
    assert used == {0, 1, 2}


def test_cross_family_leaves_out_classes_that_cannot_serve(fake_source):
    labels = np.repeat(np.arange(4), 6)
    # class 0: one family; class 1: 5 + 1; class 2: 3 + 3; class 3: 2 + 2 + 2
    groups = np.array([0] * 6 + [0] * 5 + [1] + [0] * 3 + [1] * 3 + [0, 0, 1, 1, 2, 2], np.int32)
    source = fake_source(labels, groups)

    def classes(shots, queries, ways):
        sampler = EpisodeSampler(source, 0, ways, shots, queries, "cross_family")
        return set(np.concatenate([sampler(e)["classes"] for e in range(40)]).tolist())

    assert classes(shots=1, queries=3, ways=1) == {1, 2, 3}
    assert classes(shots=3, queries=3, ways=1) == {2}
    assert classes(shots=2, queries=4, ways=1) == {3}
    with pytest.raises(UsageError, match=r"has 1 classes for cross_family episodes, but 2 ways"):
        classes(shots=3, queries=3, ways=2)


def test_same_episodes_in_a_fresh_process():
    program = """
import hashlib
from xattn.data.episodes import fixed_episodes
from xattn.data.glyphs import GlyphFS
drawn = fixed_episodes(
    GlyphFS("test"), seed=3, ways=5, shots=1, queries=2, num_episodes=9, mode="cross_family"
)
digest = hashlib.sha256(b"".join(drawn[k].tobytes() for k in sorted(drawn))).hexdigest()
"""
    here = {}
    exec(program, here)
    fresh = subprocess.run(
        [sys.executable, "-c", program + "print(digest)"], capture_output=True, text=True, check=True
    )
    assert fresh.stdout.strip() == here["digest"]


def test_seeds_and_splits_have_different_episodes(shuffled_source):
    def drawn(seed, split):
        source = shuffled_source(split=split)
        return fixed_episodes(source, seed=seed, ways=5, shots=1, queries=2, num_episodes=5)["query"].tobytes()

    streams = [drawn(seed, split) for seed in range(3) for split in ("train", "val", "test")]
    assert len(set(streams)) == 9


def test_fixed_episodes_stack_the_episodes_and_a_longer_list_only_adds(shuffled_source):
    source = shuffled_source()
    long = fixed_episodes(source, seed=1, ways=3, shots=2, queries=4, num_episodes=6)
    short = fixed_episodes(source, seed=1, ways=3, shots=2, queries=4, num_episodes=2)
    assert {name: rows.shape for name, rows in long.items()} == {
        "support": (6, 3, 2),
        "query": (6, 12),
        "query_labels": (6, 12),
        "classes": (6, 3),
    }
    for name, rows in short.items():
        np.testing.assert_array_equal(rows, long[name][:2])
    sampler = EpisodeSampler(source, 1, 3, 2, 4)
    np.testing.assert_array_equal(long["query"][5], sampler(5)["query"])


def test_a_constant_answer_scores_exactly_chance(shuffled_source):
    drawn = fixed_episodes(shuffled_source(), seed=0, ways=5, shots=1, queries=3, num_episodes=20)
    assert (100 * (drawn["query_labels"] == 0).mean(1) == 20.0).all()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"ways": 0}, "Episodes need ways of at least 1, but got 0."),
        ({"queries": -2}, "Episodes need queries of at least 1, but got -2."),
        ({"seed": -1}, "Episodes need a seed of at least 0, but got -1."),
        ({"mode": "mix"}, "There is no episode mode 'mix': choose one of mixed, cross_family."),
        (
            {"ways": 9},
            "fake (train) has 7 classes for mixed episodes, but 9 ways were asked for: ask for 7 or fewer.",
        ),
        (
            {"shots": 5, "queries": 5},
            "Class 'class0' of fake (train) has 9 images, but 5 shots and 5 queries need 10: "
            "lower the shots or the queries, or leave the class out.",
        ),
    ],
)
def test_mistakes_are_named(shuffled_source, change, sentence):
    arguments = {"source": shuffled_source(), "seed": 0, "ways": 5, "shots": 1, "queries": 3} | change
    with pytest.raises(UsageError) as error:
        EpisodeSampler(**arguments)
    assert str(error.value) == sentence


def test_cross_family_needs_groups(fake_source):
    source = fake_source(np.repeat(np.arange(7), 9))
    with pytest.raises(UsageError, match="fake .train. has no groups of images, which cross_family needs"):
        EpisodeSampler(source, seed=0, ways=5, shots=1, queries=3, mode="cross_family")


def test_a_class_without_images_is_named(fake_source):
    source = fake_source(np.repeat([0, 2], 5))
    with pytest.raises(UsageError, match="Class 'class1' of fake .train. has 0 images"):
        EpisodeSampler(source, seed=0, ways=2, shots=1, queries=1)
