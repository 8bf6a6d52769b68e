"""Which samples a step trains on: pure functions of (seed, step), so that they depend on no number of processes.

Every bucket has an endless stream of its members: epoch after epoch a permutation of all of them. A batch is a piece
of one stream, so it is of one bucket; what an epoch of a bucket leaves over begins the bucket's next batch. With one
bucket, place i of step n is number `n * batch + i` of the stream.
Letters: N members of a bucket, S shards.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ptdit_diffusers.training.randomness import Stream, numpy_generator

LARGE = 10_000_000  # members above which whole shards are shuffled, then groups of them together: reading stays local
TOGETHER = 16  # shards in such a group


def places(batch: int, part: int, parts: int) -> range:
    """Return the places 0..batch - 1 of a global batch that part `part` of `parts` takes, for any number of parts."""
    return range(batch * part // parts, batch * (part + 1) // parts)


class MemberStream:
    """The members of one bucket, again and again in new orders.

    Args:
        members: (N,) numbers of samples, in the order in which they are stored.
        shards: (N,) the shard of each, ascending; only read where N > `large`.
        seeds: Of the permutations.
        large: N above which the permutation has two levels.
    """

    def __init__(self, members: np.ndarray, shards: np.ndarray, seeds: Sequence[int], large: int = LARGE) -> None:
        self.members, self.seeds, self.large = members, tuple(seeds), large
        self.starts = np.array([0, len(members)])
        if len(members) > large:
            self.starts = np.concatenate([[0], np.flatnonzero(np.diff(shards)) + 1, [len(members)]])
        self.epoch, self.groups, self.bounds = -1, [np.zeros(1, np.int64)], np.zeros(2, np.int64)
        self.shuffled, self.order = (-1, -1), np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.members)

    def take(self, begin: int, count: int) -> np.ndarray:
        """Return `count` members from position `begin` of the stream on."""
        found, end = [], begin + count
        while begin < end:
            epoch, place = divmod(begin, len(self))
            self._begin_epoch(epoch)
            group = int(np.searchsorted(self.bounds, place, side="right")) - 1
            order = self._shuffled_group(epoch, group)[place - self.bounds[group] :][: end - begin]
            found.append(self.members[order])
            begin += len(order)
        return np.concatenate(found) if found else self.members[:0]

    def _begin_epoch(self, epoch: int) -> None:
        """Choose which shards are shuffled together in an epoch."""
        if epoch == self.epoch:
            return
        sizes, count = np.diff(self.starts), len(self.starts) - 1
        order = numpy_generator(*self.seeds, epoch).permutation(count) if count > 1 else np.zeros(1, np.int64)
        self.groups = [order[i : i + TOGETHER] for i in range(0, count, TOGETHER)]
        self.bounds = np.concatenate([[0], np.cumsum([sizes[group].sum() for group in self.groups])])
        self.epoch = epoch

    def _shuffled_group(self, epoch: int, group: int) -> np.ndarray:
        """Return the numbers of the members in a group of shards, shuffled; the last group is kept."""
        if self.shuffled != (epoch, group):
            rows = [np.arange(self.starts[shard], self.starts[shard + 1]) for shard in self.groups[group]]
            self.order = numpy_generator(*self.seeds, epoch, group).permutation(np.concatenate(rows))
            self.shuffled = epoch, group
        return self.order


class Order:
    """The batches of a stage of training.

    Args:
        buckets: Name of each bucket -> numbers of its samples (N,), in the order in which they are stored.
        shards: (samples,) the shard of every sample.
        seeds: Of everything random, for example (seed, stage).
        batch: Samples of a step, of all processes together.
        large: As for `MemberStream`.

    Raises:
        ValueError: There are no samples.
    """

    def __init__(
        self,
        buckets: Mapping[int, np.ndarray],
        shards: np.ndarray,
        seeds: Sequence[int],
        batch: int,
        large: int = LARGE,
    ) -> None:
        self.seeds, self.batch_size = tuple(seeds), batch
        self.streams = {
            name: MemberStream(members, shards[members], (*seeds, Stream.OWN_MEMBERS, name), large)
            for name, members in sorted(buckets.items())
            if len(members)
        }
        if not self.streams:
            raise ValueError("there are no samples to train on.")
        self.count = sum(map(len, self.streams.values()))
        self.epoch, self.labels = -1, np.zeros(0, np.int64)

    def batches_before(self, epoch: int) -> int:
        """Return how many batches the epochs before this one have."""
        return sum(epoch * len(stream) // self.batch_size for stream in self.streams.values())

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step."""
        epoch = step * self.batch_size // self.count
        while self.batches_before(epoch + 1) <= step:
            epoch += 1
        return epoch

    def bucket(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and the position in its stream at which the batch begins."""
        epoch = self.epoch_of(step)
        if epoch != self.epoch:
            counts = [
                (epoch + 1) * len(stream) // self.batch_size - epoch * len(stream) // self.batch_size
                for stream in self.streams.values()
            ]
            labels = np.repeat(np.array(list(self.streams)), counts)
            self.labels = numpy_generator(*self.seeds, Stream.OWN_BATCHES, epoch).permutation(labels)
            self.epoch = epoch
        place = step - self.batches_before(epoch)
        name = int(self.labels[place])
        earlier = epoch * len(self.streams[name]) // self.batch_size + int((self.labels[:place] == name).sum())
        return name, earlier * self.batch_size

    def members(self, step: int, part: int = 0, parts: int = 1) -> tuple[int, np.ndarray]:
        """Return the bucket of a step, and the samples at the `places` of one part of its batch."""
        name, begin = self.bucket(step)
        mine = places(self.batch_size, part, parts)
        return name, self.streams[name].take(begin + mine.start, len(mine))
