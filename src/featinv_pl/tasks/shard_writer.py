"""Writes what `FeatureExtraction` predicts as feature shards."""

import logging
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from featinv_pl.data.images.datamodule import ImageData
from featinv_pl.data.images.sources import ImageSource
from featinv_pl.data.order import cut
from featinv_pl.data.shards.manifest import MANIFEST, Settings
from featinv_pl.data.shards.samples import ImageFormat, Storage
from featinv_pl.data.shards.writer import ShardSetWriter, shard_ranges
from featinv_pl.errors import UserError
from featinv_pl.types import Batch

log = logging.getLogger(__name__)

TRIAL_BATCHES = 8


class ShardWriter(Callback):
    """Writes one shard set per source, as `<folder>/<source>/`.

    Interrupted at any moment, the same command resumes after the last complete shard, on as many
    processes as there are then, and leaves byte for byte what it would have left uninterrupted. The
    manifest of a source follows when its shards are complete.

    Args:
        folder: Where the shard sets go, if not directly below the run's folder.
        shard_size: Samples per shard; best a multiple of the batch size, since no batch reaches
            across two shards.
        image_format: `png` keeps every bit; `jpg`, of quality 95, suits training sets of large photographs, whose
            images are not scored.
        storage: Of feature maps: `float16`, or `int8` with a step for each channel, in half the space.
        max_bad_fraction: Give up when more than this share (0 to 1) of a source's images cannot be read; those
            that cannot are named in the manifest.
        dry_run: After a short trial print samples, shards, bytes and hours, and write nothing.
    """

    folder: Path

    def __init__(
        self,
        folder: Path | None = None,
        shard_size: int = 1000,
        image_format: ImageFormat = "png",
        storage: Storage = "float16",
        max_bad_fraction: float = 0.001,
        dry_run: bool = False,
    ) -> None:
        if shard_size < 1:
            raise UserError(f"`shard_size` must be at least 1, and is {shard_size}.")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"`max_bad_fraction` is a share of 0 to 1, and is {max_bad_fraction}.")
        self.given, self.shard_size, self.image_format, self.storage = folder, shard_size, image_format, storage
        self.max_bad_fraction, self.dry_run = max_bad_fraction, dry_run
        self.writers: dict[str, ShardSetWriter] = {}
        self.trial: _Trial | None = None
        self._space_checked = False

    def unfinished_folders(self, root: Path, data: Any) -> list[Path]:
        """The folders of the shard sets that are still to be made of a data module's images, for a run to claim."""
        folders = [(self.given or root) / images.source for images in getattr(data, "predicted", [])]
        return [folder for folder in folders if not (folder / MANIFEST).exists()]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data, model = getattr(trainer, "datamodule", None), cast(Any, pl_module)
        if not isinstance(data, ImageData) or not data.predicted:
            raise UserError(
                "`data`: there is nothing to extract features of. Give DigitsData with sources, or FolderData with "
                "folders to predict, such as --data.predict.mine=FOLDER."
            )
        self.folder = self.given or Path(trainer.default_root_dir)
        ranks, provenance = (trainer.global_rank, trainer.world_size), model.provenance
        dtype = model.choose_dtype(data.predicted[0], trainer.strategy.root_device)
        for images in data.predicted:
            classes = {name: model.backbone.classes.label(name) for name in images.classes}  # -1 for unknown ones
            settings = self._settings(images, classes, data.batch_size, trainer.limit_predict_batches)
            if dtype != "float32":
                settings["autoencoder_dtype"] = dtype
            self.writers[images.source] = ShardSetWriter(
                self.folder / images.source, images.source, settings, provenance, *ranks, self.max_bad_fraction
            )
        trainer.strategy.barrier()  # all ranks have seen the same shards before any rank adds some
        left = {source: cut(one.share, data.batch_size) for source, one in self.writers.items() if one.missing}
        if self.dry_run and left:
            source = next(iter(left))
            self.trial = _Trial(self.writers[source])
            left = {source: cut(self.trial.writer.share, data.batch_size)[:TRIAL_BATCHES]}
        data.extract_only(left)
        if trainer.is_global_zero and not self.dry_run:
            for source, writer in self.writers.items():
                writer.begin()
                _note_classes(source, writer.settings)
                if writer.finished:
                    log.info("'%s' already holds the finished shard set, which is left as it is.", writer.folder)
        trainer.strategy.barrier()  # what an interrupted run has left is removed before any rank writes

    def _settings(
        self, images: ImageSource, classes: dict[str, int], batch_size: int, limit: int | float | None
    ) -> Settings:
        settings: Settings = {
            "images": images.num_images,
            "images_sha256": images.digest(),
            "classes": classes,
            "preparation": images.preparation,
            "samples": len(images),
            "shard_size": self.shard_size,
            "batch_size": batch_size,
            "image_format": self.image_format,
            "storage": self.storage,
        }
        if isinstance(limit, int):
            settings["samples"] = sum(map(len, cut(shard_ranges(settings), batch_size)[:limit]))
        elif limit not in (None, 1.0):
            raise UserError(
                f"`limit_predict_batches` must be a whole number of batches here, and is {limit}: the share of an "
                "extraction that resumes after an interruption would be another each time."
            )
        return settings

    def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        batch = cast(Batch, outputs)
        if self.trial is not None:
            self.trial.add(batch)
            return
        writer = self.writers[batch["source"][0]]
        writer.add(batch)
        if not self._space_checked and writer.samples_written:
            self._space_checked = True
            self._check_space(writer.bytes_per_sample)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for writer in self.writers.values():
            writer.close()
        if self.trial is not None:
            self.trial.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the manifests. Here, because Lightning calls no other hook on ranks with nothing to predict."""
        if self.dry_run:
            self._print_estimate(*(self.trial.close() if self.trial is not None else (0.0, 1.0)), trainer.world_size)
            return
        for writer in self.writers.values():
            writer.flush()
            writer.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            for writer in self.writers.values():
                if not writer.finished:
                    writer.finish()

    @rank_zero_only
    def _print_estimate(self, size: float, rate: float, ranks: int) -> None:
        """Print what the extraction will take, by a trial's bytes per sample and samples per second."""
        row = f"{{:{max(map(len, ['source', *self.writers]))}}}{{:>12}}{{:>12}}{{:>12}}{{:>12}}".format
        print(row("source", "samples", "shards", "to do", "GB to do"))
        for source, writer in self.writers.items():
            shards, to_do = len(shard_ranges(writer.settings)), sum(map(len, writer.missing))
            print(row(source, writer.settings["samples"], shards, to_do, f"{to_do * size / 1e9:.3f}"))
        samples = self._samples_to_do()
        print(
            f"{samples} samples of {size / 1e3:.1f} kB: {samples * size / 1e9:.3f} GB, and about "
            f"{samples / rate / ranks / 3600:.2f} hours on {ranks} process{'es' * (ranks > 1)} of {rate:.1f} samples "
            "per second, by a short trial."
        )
        self._check_space(size)

    def _samples_to_do(self) -> int:
        return sum(len(samples) for writer in self.writers.values() for samples in writer.missing)

    def _check_space(self, bytes_per_sample: float) -> None:
        """Refuse an extraction for which the disk is too small; the folder need not exist yet."""
        needed = self._samples_to_do() * bytes_per_sample
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if needed > (free := shutil.disk_usage(existing).free):
            raise UserError(
                f"`folder`: the shards still to be written need about {needed / 1e9:.2f} GB, and '{self.folder}' has "
                f"{free / 1e9:.2f} GB free. Free space, choose another disk, or store less (`storage`: int8, "
                "`image_format`: jpg, fewer views)."
            )


class _Trial:
    """A few batches written into a temporary folder, to measure how long they take and how large they are."""

    def __init__(self, planned: ShardSetWriter) -> None:
        self._folder = TemporaryDirectory()
        set_of = (planned.source, planned.settings, planned.provenance)
        self.writer = ShardSetWriter(Path(self._folder.name), *set_of, max_bad_fraction=1)
        self._start = 0.0
        self._samples: list[int] = []

    def add(self, batch: Batch) -> None:
        self.writer.add(batch)
        self._start = self._start or time.monotonic()  # the clock starts when the first batch has come
        self._samples.append(len(batch["key"]))

    def close(self) -> tuple[float, float]:
        """Remove what was written, and return bytes per sample and samples per second after the first batch."""
        self.writer.flush()
        seconds = time.monotonic() - self._start
        self.writer.close()
        self._folder.cleanup()
        if not self._samples:
            return 0.0, 1.0
        return self.writer.bytes_per_sample, (sum(self._samples[1:]) or self._samples[0]) / seconds


def _note_classes(source: str, settings: Settings) -> None:
    """Say of which images the labels are not known, so that no accuracy comes as a surprise."""
    classes = settings.get("classes", {})
    unknown = [name for name, label in classes.items() if label < 0]
    if unknown:
        log.warning(
            f"{source}: {len(unknown)} of {len(classes)} classes, such as '{unknown[0]}', are not among the "
            "classifier's, as far as their names or the order of ImageNet tell. Their images get the label -1, and "
            "label@1 leaves them out."
        )
    elif not classes:
        log.warning(f"{source}: the images have no classes, so they get the label -1, and there is no label@1.")
