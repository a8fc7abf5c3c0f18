"""Feature shards as a LightningDataModule: shuffled for training, exactly once for evaluation."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from featinv_pl.data.batches import Batches, ShuffledBatches, cut
from featinv_pl.data.entries import widen
from featinv_pl.data.manifests import Manifest, find_sets
from featinv_pl.data.remote import RemoteSet, is_remote
from featinv_pl.data.shards import OnError, ShardSet
from featinv_pl.errors import UserError
from featinv_pl.types import Batch

NAMED = 10  # damaged samples in the summary; of more there is only the number


class BatchReader(Dataset[Batch]):
    """A shard set read a batch at a time: its index is the list of samples in a batch.

    Args:
        shards: The set.
        half: Leave batches in half precision.
    """

    def __init__(self, shards: ShardSet, half: bool) -> None:
        self.shards, self.half = shards, half

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        batch = self.shards.batch(numbers)
        return batch if self.half else widen(batch)


class FeatureShards(LightningDataModule):
    """Streams shard sets.

    A set is a folder, or an address (`https://...`, `s3://...`) from which whole shards are fetched
    into a cache when they are needed.

    Training resumes within an epoch: a checkpoint notes how many batches of it have been seen, and
    the order is a function of seed and epoch alone.

    Args:
        train: A shard set to train on.
        val: A shard set for validation.
        test: Shard sets by name of source. A folder of sets gives one source for each set below it.
        batch_size: Samples per batch and process.
        num_workers: Processes that read, per rank.
        seed: Seed of the training order.
        on_error: What to do about damaged shards and samples: `raise` an error that names the first,
            or `skip` and count them.
        cache: Where shards from elsewhere are kept.
        allow_pipe: Allow sets of the form `pipe:COMMAND`, which run a command on this machine; it
            prints the file whose name takes the place of `{}`.
    """

    def __init__(
        self,
        train: Path | str | None = None,
        val: Path | str | None = None,
        test: dict[str, Path | str] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        on_error: OnError = "raise",
        cache: Path = Path("~/.cache/featinv-pl"),
        allow_pipe: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"--data.batch_size must be at least 1, and is {batch_size}.")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.on_error, self.cache, self.allow_pipe = on_error, cache, allow_pipe
        self.train = self._set(train, "train", "--data.train", with_images=False) if train else None
        self.val = self._set(val, "val", "--data.val") if val else None
        self.test = {
            source: self._set(path, source, f"--data.test.{name}")
            for name, place in (test or {}).items()
            for source, path in ({name: place} if is_remote(str(place)) else find_sets(name, Path(place))).items()
        }
        self.skipped: list[str] = []
        self._resumed: dict[str, Any] | None = None

    def _set(self, place: Path | str, source: str, option: str, with_images: bool = True) -> ShardSet:
        if is_remote(str(place)):
            remote = RemoteSet(str(place), self.cache, option, self.allow_pipe)
            return ShardSet(remote.folder, source, option, with_images, self.on_error, remote)
        return ShardSet(Path(place), source, option, with_images, self.on_error)

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The manifests of all sets, by the folder they lie in: a model checks that it fits them."""
        return {str(shards.folder): shards.manifest for shards in self._sets}

    @property
    def _sets(self) -> list[ShardSet]:
        return [shards for shards in (self.train, self.val, *self.test.values()) if shards is not None]

    def sources(self, stage: str) -> list[str]:
        """Names of the sources that a stage (`fit`, `validate` or `test`) evaluates."""
        if stage == "test":
            return list(self.test)
        return [] if self.val is None else ["val"]

    # Training

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training set, in an order that depends on seed and epoch alone."""
        if self.train is None:
            raise UserError("--data.train: fit needs a shard set to train on.")
        rank, world_size = self._rank
        if len(self.train) < self.batch_size * world_size:
            raise UserError(
                f"--data.batch_size: a batch of {self.batch_size} is more than the {len(self.train) // world_size} "
                "training samples that each process gets. Lower it."
            )
        epoch, start = self._position()
        return self._loader(
            self.train,
            ShuffledBatches(self.train.shard_sizes, self.batch_size, rank, world_size, self.seed, epoch, start),
            half=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: the epoch, the batches of it that have been seen, and what orders them."""
        if self.trainer is None or self.train is None:
            return {}
        loop = self.trainer.fit_loop
        epoch, batch = cast(Any, loop.epoch_progress.current), cast(Any, loop.epoch_loop.batch_progress)
        epochs, batches = epoch.processed, 0
        if epoch.started > epoch.processed:  # within an epoch, or after its last batch but before its end
            epochs, batches = (epochs + 1, 0) if batch.is_last_batch else (epochs, batch.current.processed)
        return {"epoch": epochs, "batches": batches, "order": self._order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written; called before the loaders are made."""
        self._resumed = state_dict

    def _position(self) -> tuple[int, int]:
        """The epoch to begin with, and how many of its batches to leave out."""
        if self._resumed is None:
            return 0, 0
        state, self._resumed = self._resumed, None
        theirs, ours = state["order"], self._order
        different = [name for name in ours if theirs.get(name) != ours[name]]
        if state["batches"] and different:
            sides = "; ".join(f"{name}: {theirs.get(name)} in the checkpoint, {ours[name]} here" for name in different)
            raise UserError(
                "--ckpt_path: the checkpoint was written within an epoch, whose remaining samples only the same "
                f"settings tell ({sides}). Use those, or a checkpoint from the end of an epoch."
            )
        return state["epoch"], state["batches"]

    @property
    def _order(self) -> dict[str, Any]:
        assert self.train is not None
        samples, world_size = len(self.train), self._rank[1]
        return {"samples": samples, "batch_size": self.batch_size, "processes": world_size, "seed": self.seed}

    # Evaluation

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """The validation set, if any."""
        return [] if self.val is None else [self._evaluation_loader(self.val)]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader for each source."""
        if not self.test:
            raise UserError("--data.test: test needs shard sets, such as --data.test.clean=FOLDER.")
        return [self._evaluation_loader(shards) for shards in self.test.values()]

    def _evaluation_loader(self, shards: ShardSet) -> DataLoader[Batch]:
        rank, world_size = self._rank
        if len(shards) < world_size:
            raise UserError(
                f"--trainer.devices: '{shards.folder}' has {len(shards)} samples, which is fewer than the "
                f"{world_size} processes. Use fewer."
            )
        # Every sample once: torch's own sampler repeats some to give each rank the same number.
        return self._loader(shards, Batches(cut([range(rank, len(shards), world_size)], self.batch_size)))

    # Both

    @property
    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, shards: ShardSet, batches: Batches, half: bool = False) -> DataLoader[Batch]:
        return DataLoader(
            BatchReader(shards, half),
            batch_size=None,  # the sampler's items are batches
            sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count what the workers have left out of a batch."""
        self.skipped += batch.pop("skipped", [])
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Single precision, now that training's workers have handed over half as many bytes."""
        return widen(batch)

    def teardown(self, stage: str) -> None:
        """Say what has been left out."""
        skipped = sorted({*self.skipped, *(line for shards in self._sets for line in shards.skipped)})
        if skipped:
            count = len({*self.skipped}) + sum(len(shards.skipped) for shards in self._sets)
            named = "".join(f"\n  {line}" for line in skipped[:NAMED]) + ("\n  ..." if len(skipped) > NAMED else "")
            print(f"{count} damaged samples were skipped:{named}", file=sys.stderr)
