"""Images as LightningDataModules: how extraction and training read them."""

import logging
import os
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from featinv_pl.data.addresses import is_remote
from featinv_pl.data.images.corruptions import CORRUPTIONS, CorruptedImages
from featinv_pl.data.images.layouts import PARTS, find_sources
from featinv_pl.data.images.parquet import ParquetImages, is_parquet
from featinv_pl.data.images.severities import LEVELS
from featinv_pl.data.images.sources import AugmentedImages, FileImages, FolderImages, ImageBatches, ImageSource
from featinv_pl.data.images.tars import TarImages, expand, is_tars
from featinv_pl.data.order import Batches, ResumableData, cut
from featinv_pl.data.workers import loader, start_server
from featinv_pl.errors import UserError
from featinv_pl.files import read_text
from featinv_pl.types import ImageBatch, Missing, from_uint8

log = logging.getLogger(__name__)

Part = Literal["train", "val", "test"]


class ImageData(ResumableData, LightningDataModule):
    """The base of all data modules of images.

    Args:
        predicted: The sources to extract features of, which `predict` reads one after the other.
        batch_size: Images per batch.
        num_workers: Processes that read images.
        train: What `fit` trains on; its classes (`classes`) number the labels.
        val: What `fit` validates on.
        left_out: Why other sources cannot be extracted, by name.
        augment: Whether `fit` trains on `AugmentedImages`.
    """

    def __init__(
        self,
        predicted: Sequence[ImageSource],
        batch_size: int,
        num_workers: int = 0,
        train: ImageSource | None = None,
        val: ImageSource | None = None,
        left_out: Mapping[str, str] = {},
        augment: bool = False,
    ) -> None:
        super().__init__(batch_size)
        if num_workers:
            start_server(*{type(images).__module__ for images in (*predicted, train, val) if images is not None})
        # A process may have nothing left to extract of a source while others have.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.predicted, self.num_workers, self.train, self.val = predicted, num_workers, train, val
        self.left_out, self.augment = dict(left_out), augment
        if left_out and not any((predicted, train, val)):
            told = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            raise UserError(f"`data.predict`: no folder is there ({told}). Check the paths.")
        self.classes = next((images.classes for images in (train, val) if images is not None), ())
        self._batches = {images.source: cut([range(len(images))], batch_size) for images in predicted}

    def extract_only(self, batches: dict[str, list[Sequence[int]]]) -> None:
        """Let `predict` read these batches of these sources, instead of all samples of all sources."""
        self._batches = batches

    def predict_dataloader(self) -> list[DataLoader[ImageBatch]]:
        """One loader for each source of which something is left to do."""
        for name, reason in self.left_out.items():
            log.warning("%s: skipped, for %s.", name, reason)
        left = [images for images in self.predicted if images.source in self._batches]
        return [loader(ImageBatches(one), Batches(self._batches[one.source]), self.num_workers) for one in left]

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """The training images in complete batches, in another order each epoch."""
        if self.train is None:
            raise UserError("`data.train`: fit needs a folder of training images.")
        self.batch_size = min(self.batch_size, max(len(self.train) // self.rank[1], 1))
        images, seed = self.train, torch.initial_seed()
        batches = self.training_batches([len(images)], seed)
        if self.augment:
            images, batches.epochs_apart = AugmentedImages(images, seed), len(images)
        return loader(ImageBatches(images), batches, self.num_workers, again=True)

    def val_dataloader(self) -> list[DataLoader[ImageBatch]]:
        """The validation images in order, if any."""
        if self.val is None:
            return []
        batches = self.evaluation_batches(len(self.val), self.val.source)
        return [loader(ImageBatches(self.val), batches, self.num_workers, again=True)]

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Map bytes, of which workers hand over a quarter of the size, to [-1, 1]."""
        return {**batch, "images": from_uint8(batch["images"])}


class FolderData(ImageData):
    """Folders of images, WebDataset tars or parquet files, as batches.

    Images lie in folders of their classes, at any depth, or in the folder itself if they have no labels. Tars, such as
    `shard-{000..099}.tar`, and parquet files may lie on the hub (`hf://datasets/ORGANISATION/NAME/...`), tars also at
    `https://...`.

    Args:
        train: What to train on. Its classes, in the order of their names, number the labels.
        val: What to validate on, which may lack some of those classes.
        predict: What to extract, by name of source. A folder of several, such as ImageNet-C, gives `<name>/<path>`.
        missing: `skip` what is not there of `predict`, with a warning, or `refuse` to go on without it.
        image_size: Side of the square crop in pixels.
        crop_pct: Share (0 to 1) of the shorter side that the central crop keeps; 1 for images that were cropped before.
        views: Extract so many random views of each image (crop, horizontal flip) instead of the central crop.
        vertical_flip: Flip half of the views upside down, as the paper's authors did.
        seed: Seed of the views.
        per_class: Extract only so many images of each class, the first by file name.
        batch_size: Images per batch.
        num_workers: Processes that read images.
        label: Where tars say a sample's class, by default the first of `cls;json.label;json.cls;txt`: members, and
            fields of `json`. Of parquet files, a column.
        classes: Names of the classes by number, for labels that are numbers: a list, or a file with one name a line.
        cache: Where tars that are compressed or come from an address are kept, and the rows of parquet files.
        augment: Train on images shifted by up to an eighth of their side and flipped half of the time, anew each epoch.
    """

    def __init__(
        self,
        train: str | Path | None = None,
        val: str | Path | None = None,
        predict: dict[str, str | Path] | None = None,
        missing: Missing = "skip",
        image_size: int = 256,
        crop_pct: float = 1.0,
        views: int = 0,
        vertical_flip: bool = False,
        seed: int = 0,
        per_class: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        label: str | None = None,
        classes: list[str] | Path | None = None,
        cache: Path = Path("~/.cache/featinv-pl/images"),
        augment: bool = False,
    ) -> None:
        if not 0 < crop_pct <= 1:
            raise UserError(f"`crop_pct` is a share of the shorter side, in (0, 1], and is {crop_pct:g}.")
        if views < 0:
            raise UserError(f"`views` must be 0 (the central crop) or more, and is {views}.")
        if per_class is not None and per_class < 1:
            raise UserError(f"`per_class` must be at least 1, and is {per_class}.")
        names: Sequence[str] | None = classes if isinstance(classes, list) else None
        if isinstance(classes, Path):
            names = read_text(classes, "`classes`", "Give a file with one name a line, or a list.").splitlines()

        def found(place: str | Path, source: str, option: str, **more: Any) -> FileImages:
            if not _is_folder(place):
                more |= {"cache": cache, "label": label, "option": option}
                kind = ParquetImages if is_parquet(place) else TarImages
                return kind(str(place), source, image_size, crop_pct, **more)
            return FolderImages(Path(place), source, image_size, crop_pct, **more)

        extracted: dict[str, Any] = {"views": views, "seed": seed, "vertical_flip": vertical_flip}
        extracted |= {"per_class": per_class, "tolerant": True, "classes": names}
        given = predict or {}
        gone = {name: place for name, place in given.items() if missing == "skip" and not _is_there(place)}
        predicted = [
            found(root, source, f"`data.predict.{name}`", **extracted)
            for name, place in given.items()
            if name not in gone
            for source, root in (find_sources(name, Path(place)) if _is_folder(place) else {name: place}).items()
        ]
        training = found(train, "train", "`data.train`", classes=names) if train else None
        names = training.classes if training else names
        validation = found(val, "val", "`data.val`", classes=names) if val else None
        left_out = {
            name: f"there is no {'folder' if _is_folder(place) else 'file'} '{place}'" for name, place in gone.items()
        }
        super().__init__(predicted, batch_size, num_workers, training, validation, left_out, augment)


class DividedFolder(ImageData):
    """One folder of images, in `<class>/` at any depth, which is divided into those to train on, validate on and test.

    Images are held out of each class by their path. A folder that holds `train`, `val` and `test` is divided by them.

    Args:
        folder: The folder.
        image_size: Side of the square crop in pixels.
        held_out: Share (0 to 1) of the images of each class for validation, and as many for testing.
        predict: The parts to extract.
        crop_pct: Share (0 to 1) of the shorter side that the central crop keeps.
        batch_size: Images per batch.
        num_workers: Processes that read images.
        augment: Train on images shifted by up to an eighth of their side and flipped half of the time, anew each epoch.
    """

    def __init__(
        self,
        folder: Path,
        image_size: int,
        held_out: float = 0.1,
        predict: Sequence[Part] = ("train", "val", "test"),
        crop_pct: float = 1.0,
        batch_size: int = 32,
        num_workers: int = 0,
        augment: bool = False,
    ) -> None:
        if not 0 < held_out < 0.5:
            raise UserError(f"`held_out` is a share for each of validation and test, in (0, 0.5), and is {held_out:g}.")
        divided = {part: folder / part for part in PARTS if (folder / part).is_dir()}
        if divided and len(divided) < len(PARTS):
            raise UserError(
                f"`folder`: '{folder}' holds {' and '.join(divided)} without the other of {', '.join(PARTS)}. Give it "
                "all three, or a folder of class folders, which is divided here."
            )

        def images(part: str, classes: Sequence[str] | None = None, tolerant: bool = False) -> FolderImages:
            held = None if divided else (part, held_out)
            root = divided.get(part, folder)
            return FolderImages(root, part, image_size, crop_pct, tolerant=tolerant, classes=classes, part=held)

        train = images("train")
        predicted = [images(part, train.classes, tolerant=True) for part in predict]
        val = images("val", train.classes)
        super().__init__(predicted, batch_size, num_workers, train, val, augment=augment)


class CorruptedData(ImageData):
    """The images that another data module gives to `predict`, with every corruption at every severity.

    Args:
        data: The other data module, such as folders of images.
        corruptions: Names; by default the 15 of ImageNet-C and its 4 for validation.
        severities: Of 1 to 5; by default all.
        batch_size: Images per batch, if not as many as in the other data module.
    """

    def __init__(
        self,
        data: ImageData,
        corruptions: list[str] | None = None,
        severities: list[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        if corruptions == [] or severities == []:
            raise UserError(
                "`corruptions` and `severities` cannot be empty. Give at least one of each, or leave them out."
            )
        predicted = [
            CorruptedImages(images, corruption, severity)
            for images in data.predicted
            for corruption in corruptions or CORRUPTIONS
            for severity in severities or LEVELS
        ]
        super().__init__(predicted, batch_size or data.batch_size, data.num_workers, left_out=data.left_out)


def _is_folder(place: str | Path) -> bool:
    return not is_parquet(place) and not is_tars(place)


def _is_there(place: str | Path) -> bool:
    if _is_folder(place):
        return Path(place).is_dir()
    return is_remote(str(place)) or bool(glob(str(place))) or any(map(os.path.exists, expand(str(place), "`data`")))
