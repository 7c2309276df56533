import itertools

import numpy as np
import pytest

from xattn.config import UsageError
from xattn.data.episodes import EpisodeSampler
from xattn.data.pipeline import episode_batches

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
            np.testing.assert_array_equal(np.stack(shares, 1).reshape(rows.shape), rows)


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
