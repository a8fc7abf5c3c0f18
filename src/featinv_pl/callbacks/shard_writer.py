"""Writes what `FeatureExtraction` predicts as feature shards."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from featinv_pl.data.shards import FORMAT_VERSION, MANIFEST, ImageFormat, Shard, ShardSetWriter, write_manifest
from featinv_pl.errors import UserError
from featinv_pl.types import Provenance


class ShardWriter(BasePredictionWriter):
    """Writes one shard set per source, as `<folder>/<source>/`.

    Each rank writes its own shards; the manifest follows when all are whole. A source that already
    has a manifest is refused before anything is computed.

    Args:
        folder: Where the shard sets go.
        shard_size: Samples per shard.
        image_format: `png` keeps every bit; `jpg` suits large photographs.
    """

    provenance: Provenance

    def __init__(self, folder: Path, shard_size: int = 1000, image_format: ImageFormat = "png") -> None:
        super().__init__(write_interval="batch")
        if shard_size < 1:
            raise UserError(f"--trainer.callbacks.shard_size must be at least 1, and is {shard_size}.")
        self.folder, self.shard_size, self.image_format = folder, shard_size, image_format
        self.writers: dict[str, ShardSetWriter] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to write over finished sets."""
        for loader in cast(list[Any], trainer.predict_dataloaders):
            folder = self.folder / loader.dataset.source
            if (folder / MANIFEST).exists():
                raise UserError(
                    f"--trainer.callbacks.folder: '{folder}' already holds a finished shard set, which is left as it "
                    "is. Choose another folder or other sources, or remove it first."
                )
        self.provenance = cast(Any, pl_module).provenance
        self.writers = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch to the set of its source."""
        for index, source in enumerate(prediction["source"]):
            if source not in self.writers:
                self.writers[source] = ShardSetWriter(
                    self.folder / source, source, trainer.global_rank, self.shard_size, self.image_format
                )
            self.writers[source].add(prediction, index)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the last shards and write the manifests."""
        for writer in self.writers.values():
            writer.finish_shard()
        shards = _gather({source: writer.shards for source, writer in self.writers.items()})
        if trainer.is_global_zero:
            for source in sorted({source for rank in shards for source in rank}):
                write_manifest(
                    self.folder / source,
                    {
                        "format_version": FORMAT_VERSION,
                        "package_version": version("featinv-pl"),
                        "source": source,
                        "provenance": self.provenance,
                        "shards": [shard for rank in shards for shard in rank.get(source, [])],
                    },
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close what an interruption left open."""
        for writer in self.writers.values():
            writer.close()


def _gather(shards: dict[str, list[Shard]]) -> list[dict[str, list[Shard]]]:
    """What each rank has written."""
    if not torch.distributed.is_initialized():
        return [shards]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, shards)
    return gathered
