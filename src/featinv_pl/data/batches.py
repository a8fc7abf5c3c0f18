"""Which samples make a batch: exactly once for evaluation, shuffled and resumable for training."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

SHARDS_AT_ONCE = 16


class Batches(DistributedSampler[Sequence[int]]):
    """A sampler whose items are batches.

    Lightning leaves samplers of this class alone, and would share out any other among ranks once more.
    """

    def __init__(self, batches: Sequence[Sequence[int]] = ()) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """All epochs are alike."""


class ShuffledBatches(Batches):
    """A random order that reads a few shards at a time, and can be entered anywhere.

    Shards are shuffled, then samples within groups of `SHARDS_AT_ONCE` shards, so that reading stays
    near-sequential on large sets. The order of an epoch is a function of seed and epoch alone, and
    step k of it takes the k-th stretch of `world_size * batch_size` samples, of which each rank has
    every n-th: where training stands is told by two numbers. Samples that do not fill a last step are
    left out, others in each epoch.

    Args:
        shard_sizes: Samples of each shard.
        batch_size: Samples per batch and rank.
        rank: This process's rank.
        world_size: Number of processes.
        seed: Seed of the order.
        epoch: The epoch to begin with.
        start: Batches of that epoch that have been seen before.
    """

    def __init__(
        self,
        shard_sizes: list[int],
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        self.shard_sizes, self.batch_size = shard_sizes, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches in a whole epoch; Lightning adds those that it has seen to those that it gets."""
        return sum(self.shard_sizes) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Sequence[int]]:
        start, self.start = self.start, 0  # the epochs that follow are whole
        order, step = self.order(self.epoch), self.batch_size * self.world_size
        for number in range(start, len(self)):
            yield order[number * step + self.rank : (number + 1) * step : self.world_size].tolist()

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The numbers of all samples in the order of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        ends = np.cumsum(self.shard_sizes)
        shards = rng.permutation(len(ends))
        groups = [shards[start : start + SHARDS_AT_ONCE] for start in range(0, len(shards), SHARDS_AT_ONCE)]
        return np.concatenate(
            [
                rng.permutation(np.concatenate([np.arange(ends[n] - self.shard_sizes[n], ends[n]) for n in group]))
                for group in groups
            ]
        )

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch


def cut(ranges: Sequence[Sequence[int]], batch_size: int) -> list[Sequence[int]]:
    """Cut each stretch into batches, the last of which may be smaller."""
    return [samples[start : start + batch_size] for samples in ranges for start in range(0, len(samples), batch_size)]
