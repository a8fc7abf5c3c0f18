"""Feature shards as a LightningDataModule: shuffled for training, exactly once for evaluation."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from featinv_pl.data.shards import Manifest, Sample, ShardSet, collate_samples, find_sets
from featinv_pl.errors import UserError

SHARDS_AT_ONCE = 16


class ShardShuffle(DistributedSampler[int]):
    """A random order that reads a few shards at a time.

    Shards are shuffled, then samples within groups of `SHARDS_AT_ONCE` shards, so that reading stays
    near-sequential on large sets. The order is a function of seed and epoch alone; each rank takes
    every n-th sample of it, and the few that would give one rank more than another are left out.

    Args:
        shards: The set to read.
        rank: This process's rank.
        world_size: Number of processes.
        seed: Seed of the order.
    """

    def __init__(self, shards: ShardSet, rank: int, world_size: int, seed: int) -> None:
        super().__init__(cast(Dataset[int], shards), world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self.shard_sizes = shards.shard_sizes

    def __iter__(self) -> Iterator[int]:
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        ends = torch.tensor(self.shard_sizes).cumsum(0).tolist()
        order: list[int] = []
        for group in torch.randperm(len(ends), generator=rng).split(SHARDS_AT_ONCE):
            samples = torch.cat([torch.arange(ends[n] - self.shard_sizes[n], ends[n]) for n in group.tolist()])
            order += samples[torch.randperm(len(samples), generator=rng)].tolist()
        return iter(order[self.rank : self.total_size : self.num_replicas])


class FeatureShards(LightningDataModule):
    """Streams shard sets.

    Args:
        train: A shard set to train on.
        val: A shard set for validation.
        test: Shard sets by name of source. A folder of sets gives one source for each set below it.
        batch_size: Samples per batch and process.
        num_workers: Processes that read, per rank.
        seed: Seed of the training order.
    """

    def __init__(
        self,
        train: Path | None = None,
        val: Path | None = None,
        test: dict[str, Path] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"--data.batch_size must be at least 1, and is {batch_size}.")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.train = ShardSet(train, "train", "--data.train", with_images=False) if train else None
        self.val = ShardSet(val, "val", "--data.val") if val else None
        self.test = {
            source: ShardSet(path, source, f"--data.test.{name}")
            for name, folder in (test or {}).items()
            for source, path in find_sets(name, folder, f"--data.test.{name}").items()
        }

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The manifests of all sets, by the folder they lie in: a model checks that it fits them."""
        sets = [shards for shards in (self.train, self.val, *self.test.values()) if shards is not None]
        return {str(shards.folder): shards.manifest for shards in sets}

    def sources(self, stage: str) -> list[str]:
        """Names of the sources that a stage (`fit`, `validate` or `test`) evaluates."""
        if stage == "test":
            return list(self.test)
        return [] if self.val is None else ["val"]

    def train_dataloader(self) -> DataLoader[Sample]:
        """The training set, in an order that depends on seed and epoch alone."""
        if self.train is None:
            raise UserError("--data.train: fit needs a shard set to train on.")
        rank, world_size = self._rank
        sampler = ShardShuffle(self.train, rank, world_size, self.seed)
        if len(sampler) < self.batch_size:
            raise UserError(
                f"--data.batch_size: a batch of {self.batch_size} is more than the {len(sampler)} training samples "
                "that each process gets. Lower it."
            )
        return self._loader(self.train, sampler, drop_last=True)

    def val_dataloader(self) -> list[DataLoader[Sample]]:
        """The validation set, if any."""
        return [] if self.val is None else [self._evaluation_loader(self.val)]

    def test_dataloader(self) -> list[DataLoader[Sample]]:
        """One loader for each source."""
        if not self.test:
            raise UserError("--data.test: test needs shard sets, such as --data.test.clean=FOLDER.")
        return [self._evaluation_loader(shards) for shards in self.test.values()]

    @property
    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _evaluation_loader(self, shards: ShardSet) -> DataLoader[Sample]:
        rank, world_size = self._rank
        if len(shards) < world_size:
            raise UserError(
                f"--trainer.devices: '{shards.folder}' has {len(shards)} samples, which is fewer than the "
                f"{world_size} processes. Use fewer."
            )
        # Every sample once: torch's own sampler repeats some to give each rank the same number.
        sampler = UnrepeatedDistributedSampler(shards, world_size, rank, shuffle=False)
        return self._loader(shards, sampler, drop_last=False)

    def _loader(self, shards: ShardSet, sampler: DistributedSampler[int], drop_last: bool) -> DataLoader[Sample]:
        return DataLoader(
            shards,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate_samples,
            pin_memory=torch.cuda.is_available(),
        )
