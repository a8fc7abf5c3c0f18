"""Feature shards as a LightningDataModule: shuffled for training, exactly once for evaluation."""

import logging
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from featinv_pl.data.addresses import is_remote
from featinv_pl.data.order import ResumableData
from featinv_pl.data.shards.manifest import Manifest, find_sets
from featinv_pl.data.shards.reader import BatchReader, OnError, ShardSet
from featinv_pl.data.shards.remote import RemoteSet
from featinv_pl.data.shards.samples import widen
from featinv_pl.data.workers import loader, start_server
from featinv_pl.errors import UserError
from featinv_pl.types import Batch, Missing

log = logging.getLogger(__name__)

NAMED = 10  # damaged samples in the summary; of more there is only the number


class FeatureShards(ResumableData, LightningDataModule):
    """Shard sets, as batches.

    A set is a folder, or an address (`https://...`, `s3://...`) from which complete shards are fetched into a cache
    when they are needed, or `pipe:COMMAND`, where the environment allows commands.

    Args:
        train: A shard set to train on.
        val: A shard set for validation.
        test: Test sets by name. A folder of sets gives one for each set below it; all must be finished, for `test`.
        neighbours: A shard set in which `test` searches for neighbours instead of `train`, such as central crops.
        batch_size: Samples per batch and process.
        num_workers: Processes that read, per rank.
        seed: Seed of the training order.
        on_error: `raise` an error that names the first damaged shard or sample, or `skip` and count them.
        cache: Where shards from elsewhere are kept.
        missing: `skip` test sets that are not there, with a warning and a note, or `refuse` to test without them.
    """

    def __init__(
        self,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: dict[str, str | Path] | None = None,
        neighbours: str | Path | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        on_error: OnError = "raise",
        cache: Path = Path("~/.cache/featinv-pl"),
        missing: Missing = "skip",
    ) -> None:
        super().__init__(batch_size)
        if num_workers:
            start_server(BatchReader.__module__)
        self.num_workers, self.seed, self.on_error, self.cache = num_workers, seed, on_error, cache
        self.train = self._set(train, "train", "`data.train`", with_images=False) if train else None
        self.val = self._set(val, "val", "`data.val`") if val else None
        self.neighbours = self._set(neighbours, "neighbours", "`data.neighbours`") if neighbours else None
        self.test: dict[str, ShardSet] = {}
        self.absent: dict[str, UserError] = {}
        self.refused: list[UserError] = []
        for name, place in (test or {}).items():
            try:
                self.test |= self._test_sets(name, place)
            except UserError as error:
                gone = isinstance(error.__cause__, FileNotFoundError)
                if gone and missing == "skip":
                    self.absent[name] = error
                else:  # once they are needed: training does without
                    self.refused.append(error)
        self.skipped: list[str] = []

    def _set(self, place: str | Path, source: str, option: str, with_images: bool = True) -> ShardSet:
        remote = RemoteSet(str(place), self.cache, option) if is_remote(str(place)) else None
        return ShardSet(remote.folder if remote else Path(place), source, option, with_images, self.on_error, remote)

    def _test_sets(self, name: str, place: str | Path) -> dict[str, ShardSet]:
        found = {name: place} if is_remote(str(place)) else find_sets(name, Path(place))
        return {source: self._set(path, source, f"`data.test.{name}`") for source, path in found.items()}

    @property
    def _sets(self) -> list[ShardSet]:
        return [shards for shards in (self.train, self.val, *self.test.values(), self.neighbours) if shards is not None]

    @property
    def manifests(self) -> dict[str, Manifest]:
        """The manifests of all sets by folder: a model checks that it fits them."""
        return {str(shards.folder): shards.manifest for shards in self._sets}

    @property
    def left_out(self) -> dict[str, str]:
        """Test sets that are not there, or would let processes wait for each other, with the reason."""
        small = [name for name, shards in self.test.items() if len(shards) < self.rank[1]]
        reasons = {name: str(error).partition(": ")[2] for name, error in self.absent.items()}
        return reasons | dict.fromkeys(small, "it has fewer samples than there are processes")

    def evaluated(self, stage: str) -> dict[str, ShardSet]:
        """The sets that a stage evaluates, by name; an error if a test set is unfinished or damaged."""
        if stage == "test":
            if self.refused:
                raise self.refused[0]
            return {name: shards for name, shards in self.test.items() if name not in self.left_out}
        return {} if self.val is None else {"val": self.val}

    def test_first_set_only(self) -> dict[str, int]:
        """Let a dry run read no more than the first test set; the sizes of all."""
        sizes = {name: len(shards) for name, shards in self.evaluated("test").items()}
        self.test = {name: self.test[name] for name in list(sizes)[:1]}
        return sizes

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training set, in an order that depends on seed and epoch alone."""
        if self.train is None:
            raise UserError("`data.train`: fit needs a shard set to train on.")
        batches = self.training_batches(self.train.shard_sizes, self.seed)
        timesteps = getattr(getattr(self.trainer, "lightning_module", None), "num_timesteps", None)
        draws = (torch.initial_seed(), timesteps) if timesteps else None
        batches.epochs_apart = len(self.train)
        return loader(BatchReader(self.train, draws), batches, self.num_workers, again=True)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        return [] if self.val is None else [self._evaluation_loader(self.val, again=True)]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        evaluated = self.evaluated("test")
        reasons = [f"{name}: left out, for {reason}" for name, reason in self.left_out.items()]
        if not evaluated:
            told = "; ".join(reasons) or "test needs shard sets, such as --data.test.clean=FOLDER."
            raise UserError(f"`data.test`: {told}")
        for line in reasons:
            log.warning(line)
        return [self._evaluation_loader(shards) for shards in evaluated.values()]

    def _evaluation_loader(self, shards: ShardSet, again: bool = False) -> DataLoader[Batch]:
        batches = self.evaluation_batches(len(shards), str(shards.folder))
        return loader(BatchReader(shards), batches, self.num_workers, again)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count damaged samples, and widen batches: workers hand over half as many bytes."""
        self.skipped += batch.get("skipped", [])
        return widen(batch)

    def teardown(self, stage: str) -> None:
        # Each epoch meets the samples again; a damaged shard has a line for each of its samples.
        if skipped := [*{*self.skipped}, *(line for shards in self._sets for line in shards.skipped)]:
            named = "\n  ".join(sorted({*skipped})[:NAMED])
            log.warning("%d damaged samples were skipped:\n  %s", len(skipped), named)
