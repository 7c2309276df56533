import itertools

import jax
import numpy as np
import pytest

from xattn.config import UsageError
from xattn.data.episodes import EpisodeSampler
from xattn.data.pipeline import TRANSFORMS, episode_batches, eval_batches, example_batches, example_shapes

SHAPE = {"seed": 5, "ways": 3, "shots": 2, "queries": 4}


@pytest.fixture
def batches(shuffled_source):
    """Takes so many batches of the stream with these options."""

    def take(count, **options):
        stream = episode_batches(shuffled_source(), **SHAPE | options)
        return list(itertools.islice(stream, count))

    return take


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_batch_k_holds_episodes_kb_to_kb_plus_b(batches, shuffled_source):
    source = shuffled_source()
    sampler = EpisodeSampler(source, **SHAPE)
    for k, batch in enumerate(batches(4, batch_size=4)):
        assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
            "support": ((4, 3, 2, 1, 2, 8), np.uint8),
            "query": ((4, 12, 1, 2, 8), np.uint8),
            "query_labels": ((4, 12), np.int32),
        }
        for row in range(4):
            episode = sampler(4 * k + row)
            for part in ("support", "query"):
                indices, seeds = source.read(batch[part][row])
                np.testing.assert_array_equal(indices, episode[part])
                np.testing.assert_array_equal(seeds, episode[f"{part}_seeds"])
            np.testing.assert_array_equal(batch["query_labels"][row], episode["query_labels"])


@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_share_the_same_episodes_out(batches, process_count):
    alone = batches(5, batch_size=8)
    hosts = [batches(5, batch_size=8, process_index=p, process_count=process_count) for p in range(process_count)]
    for k, batch in enumerate(alone):
        for name, rows in batch.items():
            shares = [host[k][name] for host in hosts]
            assert all(len(share) == 8 // process_count for share in shares)
            np.testing.assert_array_equal(np.concatenate(shares), rows)


@pytest.mark.parametrize("start_step", [1, 7])
def test_a_resumed_stream_continues_exactly(batches, start_step):
    whole = batches(10, batch_size=2)
    assert_equal(whole[start_step:], batches(10 - start_step, batch_size=2, start_step=start_step))
    second_host = batches(10, batch_size=2, process_index=1, process_count=2)
    resumed = batches(10 - start_step, batch_size=2, start_step=start_step, process_index=1, process_count=2)
    assert_equal(second_host[start_step:], resumed)


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_threads_change_nothing(batches, num_threads):
    assert_equal(batches(6, batch_size=2), batches(6, batch_size=2, num_threads=num_threads))


def test_num_steps_counts_from_the_start_step(batches):
    assert_equal(batches(10, batch_size=2)[3:7], batches(99, batch_size=2, start_step=3, num_steps=4))


def test_training_streams_of_different_seeds_differ(batches):
    (first,), (second,) = (batches(1, batch_size=2, seed=seed) for seed in (0, 1))
    assert (first["support"] != second["support"]).any()


def test_a_batch_that_does_not_divide_is_refused(batches):
    with pytest.raises(UsageError) as error:
        batches(1, batch_size=6, process_count=4)
    assert str(error.value) == ("A batch of 6 episodes does not divide over 4 hosts: use a multiple of 4.")


class Numbers:
    """A source whose examples say which index and seed they were asked for; its text has one word a row."""

    name, split = "numbers", "val"

    def __init__(self, num_examples=10):
        self.num_examples = num_examples

    def example(self, index, seed):
        return {"index": np.array(index), "seed": np.array(-1 if seed is None else seed), "tokens": self.text(index)}

    @staticmethod
    def text(index):
        return np.array([38, 103, 104, 38, 105 + index % 10, 106, 38, 0], np.int32)

    @staticmethod
    def shapes():
        return {
            "index": jax.ShapeDtypeStruct((), np.int64),
            "seed": jax.ShapeDtypeStruct((), np.int64),
            "tokens": jax.ShapeDtypeStruct((8,), np.int32),
        }


def examples(count, num_examples=10, **options):
    stream = example_batches(Numbers(num_examples), **{"seed": 3, "batch_size": 4} | options)
    return list(itertools.islice(stream, count))


MASKED = {"transforms": {"mask_words": {"rate": 0.5}}}


def test_the_example_at_a_position_is_what_the_recipe_gives():
    for step, batch in enumerate(examples(6)):
        for row in range(4):
            position = 4 * step + row
            order = np.random.default_rng([3, position // 10]).permutation(10)
            seed = np.random.SeedSequence([3, position]).generate_state(2)[0]
            assert (batch["index"][row], batch["seed"][row]) == (order[position % 10], seed)


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    indices = np.concatenate([batch["index"] for batch in examples(10)]).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(indices), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(row) for row in indices.tolist()}) == 4
    seeds = np.concatenate([batch["seed"] for batch in examples(10)])
    assert len(set(seeds.tolist())) == 40


def test_an_example_is_repeated_in_a_row_and_an_epoch_keeps_its_length():
    batches = examples(15, repeats=3, transforms=MASKED["transforms"])
    indices = np.concatenate([batch["index"] for batch in batches]).reshape(6, 10)
    for epoch, row in enumerate(indices):
        order = np.random.default_rng([3, epoch]).permutation(10)
        np.testing.assert_array_equal(row, np.repeat(order, 3)[:10])
    seeds = np.concatenate([batch["seed"] for batch in batches])
    assert len(set(seeds.tolist())) == 60
    masks = np.concatenate([batch["loss_mask"] for batch in batches])[:9].reshape(3, 3, -1)
    assert (masks != masks[:, :1]).any()
    hosts = [examples(1, repeats=3, batch_size=6, process_index=p, process_count=2) for p in range(2)]
    assert [host[0]["index"].tolist() for host in hosts] == [
        [index] * 3 for index in np.random.default_rng([3, 0]).permutation(10)[:2]
    ]


def test_a_batch_may_be_larger_than_an_epoch():
    (batch,) = examples(1, num_examples=3, batch_size=9)
    np.testing.assert_array_equal(np.sort(batch["index"].reshape(3, 3)), np.tile(np.arange(3), (3, 1)))


@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_share_the_same_examples_out_and_mask_them_alike(process_count):
    alone = examples(5, batch_size=8, **MASKED)
    hosts = [
        examples(5, batch_size=8, process_index=p, process_count=process_count, **MASKED) for p in range(process_count)
    ]
    for k, batch in enumerate(alone):
        for name, rows in batch.items():
            shares = [host[k][name] for host in hosts]
            assert all(len(share) == 8 // process_count for share in shares)
            np.testing.assert_array_equal(np.concatenate(shares), rows)


@pytest.mark.parametrize("start_step, num_threads", [(1, 2), (7, 0), (7, 4)])
def test_a_resumed_stream_of_examples_continues_exactly(start_step, num_threads):
    whole = examples(12, **MASKED)
    resumed = examples(99, start_step=start_step, num_steps=12 - start_step, num_threads=num_threads, **MASKED)
    assert_equal(whole[start_step:], resumed)


def test_what_is_masked_changes_with_the_seed_and_the_epoch():
    (one,), (other,) = (examples(1, seed=seed, batch_size=64, **MASKED) for seed in (0, 1))
    assert (one["loss_mask"] != other["loss_mask"]).any()
    masks = {}
    for index, mask in zip(one["index"].tolist(), one["loss_mask"], strict=True):
        masks.setdefault(index, set()).add(tuple(mask.tolist()))
    assert any(len(kinds) == 2 for kinds in masks.values())


def test_evaluation_reads_in_order_without_augmentation_and_fills_up_the_last_batch():
    batches = list(eval_batches(Numbers(), 4))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [batch["present"].tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert all((batch["seed"] == -1).all() for batch in batches)
    (batch,) = eval_batches(Numbers(), 4, num_examples=2)
    assert batch["index"].tolist() == [0, 5, 5, 5] and batch["present"].tolist() == [True, True, False, False]


def test_some_of_the_examples_are_spread_over_a_source_that_lists_class_by_class():
    source = Numbers(40)
    classes = np.repeat(np.arange(4), 10)
    batches = list(eval_batches(source, 5, MASKED["transforms"], num_examples=12))
    indices = np.concatenate([batch["index"][batch["present"]] for batch in batches])
    assert np.bincount(classes[indices]).tolist() == [3, 3, 3, 3]
    assert (np.diff(indices) > 0).all() and indices.tolist() == [3 * k + k // 3 for k in range(12)]
    # What is masked belongs to the example, however many are asked for.
    (whole,) = eval_batches(source, 40, MASKED["transforms"])
    masks = np.concatenate([batch["loss_mask"][batch["present"]] for batch in batches])
    np.testing.assert_array_equal(masks, whole["loss_mask"][indices])


def test_evaluation_masks_the_same_words_at_every_batch_size():
    def masks(batch_size, seed=0):
        batches = eval_batches(Numbers(), batch_size, MASKED["transforms"], seed=seed)
        return np.concatenate([batch["loss_mask"][batch["present"]] for batch in batches])

    np.testing.assert_array_equal(masks(3), masks(10))
    assert (masks(3) != masks(3, seed=1)).any()


def test_shapes_are_those_of_the_batches():
    (batch,) = examples(1, **MASKED)
    told = example_shapes(Numbers.shapes(), batch_size=4, seed=0, **MASKED)
    assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
        name: (field.shape, field.dtype) for name, field in told.items()
    }
    assert {"targets", "loss_mask", "input_mask"} < told.keys()


def test_transforms_run_in_the_order_of_the_table(monkeypatch):
    ran = []
    for name in TRANSFORMS:
        monkeypatch.setitem(TRANSFORMS, name, lambda batch, seeds, /, name=name: ran.append(name) or batch)
    examples(1, num_threads=0, num_steps=1, transforms={name: {} for name in reversed(TRANSFORMS)})
    assert ran == list(TRANSFORMS)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"batch_size": 6, "process_count": 4}, "A batch of 6 examples does not divide over 4 hosts"),
        ({"seed": -1}, "A stream of examples needs a seed of at least 0, but got -1."),
        ({"repeats": 0}, "A stream of examples needs repeats of at least 1, but got 0."),
        ({"transforms": {"mask_word": {}}}, "there is no transform 'mask_word': did you mean 'mask_words'?"),
        (
            {"transforms": {"mask_words": {"rat": 1}}},
            "config.pipeline.transforms.mask_words has no key 'rat': did you mean 'rate'?",
        ),
    ],
)
def test_mistakes_in_streams_of_examples_are_named_before_the_first_batch(change, sentence):
    with pytest.raises(UsageError) as error:
        example_batches(Numbers(), **{"seed": 0, "batch_size": 4} | change)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("num_examples", [0, 11])
def test_evaluating_more_examples_than_there_are_is_refused(num_examples):
    with pytest.raises(UsageError, match=rf"numbers \(val\) has 10 examples, but {num_examples} were asked for"):
        eval_batches(Numbers(), 4, num_examples=num_examples)
