"""Order of the samples: no number of processes changes it, and every sample occurs once in an epoch."""

import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from ptdit_diffusers.training.data.order import TOGETHER, MemberStream, Order, places
from ptdit_diffusers.training.data.shards import INDEX, held_out, members_by_bucket

SEEDS = (7, 0)


def order(sizes, batch, large=10**7):
    """An order of buckets with so many samples each, numbered one after another, in shards of 10."""
    ends = np.cumsum(sizes)
    buckets = {name: np.arange(end - size, end) for name, (size, end) in enumerate(zip(sizes, ends, strict=True))}
    return Order(buckets, np.arange(ends[-1]) // 10, SEEDS, batch, large)


@pytest.mark.parametrize("sizes", [[50], [31, 4, 12], [3]])
def test_the_ranks_of_any_number_of_processes_see_the_same_samples(sizes):
    steps = range(51)
    alone = [order(sizes, 8).members(step) for step in steps]
    for count in (1, 2, 3, 4):
        ranks = [order(sizes, 8) for _ in range(count)]
        for step, (bucket, expected) in zip(steps, alone, strict=True):
            parts = [each.members(step, rank, count) for rank, each in enumerate(ranks)]
            assert {name for name, _ in parts} == {bucket}
            assert np.concatenate([members for _, members in parts]).tolist() == expected.tolist()


def test_a_step_needs_no_step_before_it():
    going = [order([31, 4, 12], 8).members(step)[1].tolist() for step in range(40)]
    again = order([31, 4, 12], 8)
    for step in (39, 0, 17, 38, 5):
        assert again.members(step)[1].tolist() == going[step]


def test_with_one_bucket_a_place_is_a_number_of_an_endless_stream_of_permutations():
    taken = np.concatenate([order([50], 8).members(step)[1] for step in range(25)])  # 200 samples, 4 epochs
    epochs = taken.reshape(4, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs.tolist())
    assert not np.array_equal(epochs[0], epochs[1])
    assert order([50], 8).epoch_of(5) == 0 and order([50], 8).epoch_of(6) == 1


def test_batches_are_of_one_bucket_and_the_rest_of_an_epoch_is_not_lost():
    sizes, batch = [31, 4, 12], 8
    plan, seen = order(sizes, batch), Counter()
    for step in range(plan.batches_before(16)):  # 16 epochs: no bucket has a rest
        name, members = plan.members(step)
        low = sum(sizes[:name])
        assert len(members) == batch and all(low <= member < low + sizes[name] for member in members)
        seen.update(members.tolist())
    assert set(seen.values()) == {16} and len(seen) == sum(sizes)


def test_of_large_sets_only_a_few_shards_are_read_at_a_time():
    count = 10 * TOGETHER * 3  # three groups of shards
    stream = MemberStream(np.arange(count), np.arange(count) // 10, SEEDS, large=100)
    epoch = stream.take(0, count)
    assert sorted(epoch.tolist()) == list(range(count))
    for begin in range(0, count, 10 * TOGETHER):
        assert len(set((epoch[begin : begin + 10 * TOGETHER] // 10).tolist())) == TOGETHER
    pieces = [stream.take(begin, 7) for begin in range(0, 2 * count - 7, 7)]
    assert np.array_equal(np.concatenate(pieces)[:count], epoch)
    assert not np.array_equal(stream.take(count, count), epoch)


def test_places_cover_a_batch_once():
    for batch, parts in ((8, 3), (3, 3), (10, 4), (5, 1)):
        assert [place for part in range(parts) for place in places(batch, part, parts)] == list(range(batch))


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        Order({0: np.zeros(0, np.int64)}, np.zeros(0), SEEDS, 2)


def test_a_million_entries_begin_in_two_seconds_and_300_megabytes(tmp_path):
    choice, count = np.random.default_rng(0), 1_000_000
    made = np.zeros(count, INDEX)
    made["shard"], made["row"] = np.divmod(np.arange(count), 4096)
    made["bucket"] = choice.integers(0, 7, count)
    made["group"] = choice.integers(0, 2**63, count, dtype=np.uint64)
    np.save(tmp_path / "index.npy", made)
    tracemalloc.start()
    began = time.process_time()
    index = np.load(tmp_path / "index.npy", mmap_mode="r")
    kept = ~held_out(index["group"], 20000, 7)
    plan = Order(members_by_bucket(index, kept), index["shard"], SEEDS, 10240)
    _, members = plan.members(1000)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 2 and peak < 300e6
    assert kept.sum() == count - 20000 and len(members) == 10240
