"""Feature shards as a LightningDataModule: shuffled for training, exactly once for evaluation."""

import sys
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from featinv_pl.data.order import ResumableData
from featinv_pl.data.shards.manifest import Manifest, find_sets
from featinv_pl.data.shards.reader import BatchReader, OnError, ShardSet
from featinv_pl.data.shards.remote import RemoteSet, is_remote
from featinv_pl.data.shards.samples import widen
from featinv_pl.data.workers import loader, start_server
from featinv_pl.errors import UserError
from featinv_pl.types import Batch

NAMED = 10  # damaged samples in the summary; of more there is only the number


class FeatureShards(ResumableData, LightningDataModule):
    """Streams shard sets.

    A set is a folder, or an address (`https://...`, `s3://...`) from which whole shards are fetched
    into a cache when they are needed, or `pipe:COMMAND`, where the environment allows commands.

    Args:
        train: A shard set to train on.
        val: A shard set for validation.
        test: Shard sets by name of source. A folder of sets gives one source for each set below it, and is
            refused while one is unfinished.
        neighbours: A shard set in which `test` searches for neighbours instead of `train`, such as central crops of
            the images of which `train` holds random views.
        batch_size: Samples per batch and process.
        num_workers: Processes that read, per rank.
        seed: Seed of the training order.
        on_error: What to do about damaged shards and samples: `raise` an error that names the first,
            or `skip` and count them.
        cache: Where shards from elsewhere are kept.
    """

    def __init__(
        self,
        train: Path | str | None = None,
        val: Path | str | None = None,
        test: dict[str, Path | str] | None = None,
        neighbours: Path | str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        on_error: OnError = "raise",
        cache: Path = Path("~/.cache/featinv-pl"),
    ) -> None:
        super().__init__(batch_size)
        if num_workers:
            start_server(BatchReader.__module__)
        self.num_workers, self.seed = num_workers, seed
        self.on_error, self.cache = on_error, cache
        self.train = self._set(train, "train", "--data.train", with_images=False) if train else None
        self.val = self._set(val, "val", "--data.val") if val else None
        self.test = {
            source: self._set(path, source, f"--data.test.{name}")
            for name, place in (test or {}).items()
            for source, path in ({name: place} if is_remote(str(place)) else find_sets(name, Path(place))).items()
        }
        self.neighbours = self._set(neighbours, "neighbours", "--data.neighbours") if neighbours else None
        self.skipped: list[str] = []

    def _set(self, place: Path | str, source: str, option: str, with_images: bool = True) -> ShardSet:
        if is_remote(str(place)):
            remote = RemoteSet(str(place), self.cache, option)
            return ShardSet(remote.folder, source, option, with_images, self.on_error, remote)
        return ShardSet(Path(place), source, option, with_images, self.on_error)

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The manifests of all sets, by the folder they lie in: a model checks that it fits them."""
        return {str(shards.folder): shards.manifest for shards in self._sets}

    @property
    def _sets(self) -> list[ShardSet]:
        sets = (self.train, self.val, *self.test.values(), self.neighbours)
        return [shards for shards in sets if shards is not None]

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
        return loader(
            BatchReader(self.train, half=True),
            self.training_batches(self.train.shard_sizes, self.seed),
            self.num_workers,
            again=True,
        )

    # Evaluation

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """The validation set, if any."""
        return [] if self.val is None else [self._evaluation_loader(self.val, again=True)]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader for each source."""
        if not self.test:
            raise UserError("--data.test: test needs shard sets, such as --data.test.clean=FOLDER.")
        return [self._evaluation_loader(shards, again=False) for shards in self.test.values()]

    def _evaluation_loader(self, shards: ShardSet, again: bool) -> DataLoader[Batch]:
        batches = self.evaluation_batches(len(shards), str(shards.folder))
        return loader(BatchReader(shards, half=False), batches, self.num_workers, again)

    # Both

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
