"""Which process sees which sample when: once each for evaluation, shuffled and resumable exactly for training."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from featinv_pl.errors import UserError

SHARDS_AT_ONCE = 16


class Batches(DistributedSampler[Sequence[int]]):
    """A sampler whose items are batches. Lightning would divide any other class among ranks once more."""

    def __init__(self, batches: Sequence[Sequence[int]] = ()) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(eq=False)
class ShuffledBatches(Batches):
    """A random order that reads a few shards at a time and can start anywhere.

    Shards are shuffled, then samples within groups of `SHARDS_AT_ONCE` shards, so that reading stays near-sequential
    on large sets. The order of an epoch is a function of seed and epoch alone. Step k takes the k-th stretch of
    `world_size * batch_size` samples, of which each rank has every n-th: two numbers tell how far training has come,
    the epoch to begin with and how many of its batches to skip (`start`). Samples that do not fill the last step are
    left out, others in each epoch. A data set that changes its samples from epoch to epoch has them in each
    `epochs_apart` numbers further.
    """

    shard_sizes: list[int]
    batch_size: int
    rank: int
    world_size: int
    seed: int
    epoch: int = 0
    start: int = 0
    epochs_apart: int = 0

    def __len__(self) -> int:
        """Batches in a complete epoch: Lightning adds those seen before to those that it gets."""
        return sum(self.shard_sizes) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Sequence[int]]:
        start, self.start = self.start, 0  # the epochs that follow are complete
        order, step = self.order(self.epoch) + self.epoch * self.epochs_apart, self.batch_size * self.world_size
        for number in range(start, len(self)):
            yield order[number * step + self.rank : (number + 1) * step : self.world_size].tolist()

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The numbers of all samples in the order of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        samples = np.split(np.arange(sum(self.shard_sizes)), np.cumsum(self.shard_sizes)[:-1])
        shards = rng.permutation(len(samples))
        groups = np.split(shards, range(SHARDS_AT_ONCE, len(shards), SHARDS_AT_ONCE))
        return np.concatenate([rng.permutation(np.concatenate([samples[n] for n in group])) for group in groups])


def cut(ranges: Sequence[Sequence[int]], batch_size: int) -> list[Sequence[int]]:
    """Cut each stretch into batches, the last of which may be smaller."""
    return [samples[start : start + batch_size] for samples in ranges for start in range(0, len(samples), batch_size)]


class ResumableData:
    """A data module whose training resumes within an epoch, and whose evaluation sees each sample exactly once.

    A checkpoint notes how many batches of an epoch have been seen; a step takes the same samples on any number of
    processes that share a batch of the same size. Comes before `LightningDataModule` among the bases of a class, since
    loader workers import this module and should not wait for Lightning.
    """

    trainer: Any
    position: Callable[[], tuple[int, int]] | None = None  # epoch and its batches seen; set by `runtime.resuming`

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"`batch_size` must be at least 1, and is {batch_size}.")
        self.batch_size = batch_size
        self._order: dict[str, Any] = {}
        self._resumed: dict[str, Any] = {}

    @property
    def rank(self) -> tuple[int, int]:
        """This process's rank, and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def training_batches(self, sizes: list[int], seed: int) -> ShuffledBatches:
        """Batches of a training set with shards of these sizes, from where a checkpoint was written."""
        (rank, world_size), samples = self.rank, sum(sizes)
        if (each := samples // world_size) < self.batch_size:
            raise UserError(f"`batch_size`: {self.batch_size} is more than the {each} training samples of a process.")
        self._order = {"samples": samples, "batch_size": self.batch_size, "processes": world_size, "seed": seed}
        state = self._resumed or {"epoch": 0, "batches": 0, "order": self._order}
        self._resumed, theirs = {}, state["order"]
        changed = [
            f"{name}: {theirs.get(name)} in the checkpoint, {value} here"
            for name, value in self._order.items()
            if theirs.get(name) != value
        ]
        if state["batches"] and changed:
            raise UserError(
                "`ckpt_path`: the checkpoint was written within an epoch, whose remaining samples depend on settings "
                f"that have changed ({'; '.join(changed)}). Use those, or a checkpoint from the end of an epoch."
            )
        return ShuffledBatches(sizes, self.batch_size, rank, world_size, seed, state["epoch"], state["batches"])

    def evaluation_batches(self, samples: int, name: str) -> Batches:
        """All samples, divided: torch's own sampler repeats some to give each rank the same number."""
        rank, world_size = self.rank
        if samples < world_size:
            raise UserError(f"`trainer.devices`: '{name}' has {samples} samples. Use no more processes than that.")
        return Batches(cut([range(rank, samples, world_size)], self.batch_size))

    def state_dict(self) -> dict[str, Any]:
        """How far training has come, and what decides the order."""
        if self.position is None or not self._order:
            return {}
        epoch, batches = self.position()
        return {"epoch": epoch, "batches": batches, "order": self._order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume where a checkpoint was written; called before the loaders are made."""
        self._resumed = state_dict
