"""Images as LightningDataModules: how extraction and training read them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from featinv_pl.data.images.corruptions import CORRUPTIONS, CorruptedImages
from featinv_pl.data.images.layouts import find_sources
from featinv_pl.data.images.severities import LEVELS
from featinv_pl.data.images.sources import FolderImages, ImageBatches, ImageSource
from featinv_pl.data.order import Batches, ResumableData, cut
from featinv_pl.data.workers import loader, start_server
from featinv_pl.errors import UserError
from featinv_pl.types import ImageBatch


class ImageData(ResumableData, LightningDataModule):
    """The base of all data modules of images.

    Args:
        predicted: The sources to extract features of, which `predict` reads one after the other.
        batch_size: Images per batch.
        num_workers: Processes that read images.
        train: What `fit` trains on; its classes (`classes`) number the labels.
        val: What `fit` validates on.
    """

    def __init__(
        self,
        predicted: Sequence[ImageSource],
        batch_size: int,
        num_workers: int = 0,
        train: ImageSource | None = None,
        val: ImageSource | None = None,
    ) -> None:
        super().__init__(batch_size)
        if num_workers:
            start_server(*{type(images).__module__ for images in (*predicted, train, val) if images is not None})
        # A process may have nothing left to extract of a source while others have.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.predicted, self.num_workers, self.train, self.val = predicted, num_workers, train, val
        self.classes = next((images.classes for images in (train, val) if images is not None), ())
        self._batches = {images.source: cut([range(len(images))], batch_size) for images in predicted}

    def extract_only(self, batches: dict[str, list[Sequence[int]]]) -> None:
        """Let `predict` read these batches of these sources, instead of all samples of all sources."""
        self._batches = batches

    def predict_dataloader(self) -> list[DataLoader[ImageBatch]]:
        """One loader for each source of which something is left to do."""
        left = [images for images in self.predicted if images.source in self._batches]
        return [loader(ImageBatches(one), Batches(self._batches[one.source]), self.num_workers) for one in left]

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """The training images in complete batches, in another order each epoch."""
        if self.train is None:
            raise UserError("`data.train`: fit needs a folder of training images.")
        self.batch_size = min(self.batch_size, max(len(self.train) // self.rank[1], 1))
        batches = self.training_batches([len(self.train)], torch.initial_seed())
        return loader(ImageBatches(self.train), batches, self.num_workers, again=True)

    def val_dataloader(self) -> list[DataLoader[ImageBatch]]:
        """The validation images in order, if any."""
        if self.val is None:
            return []
        batches = self.evaluation_batches(len(self.val), self.val.source)
        return [loader(ImageBatches(self.val), batches, self.num_workers, again=True)]


class FolderData(ImageData):
    """Folders of images, as batches.

    Images lie in folders of their classes, at any depth, or in the folder itself if they have no labels.

    Args:
        train: A folder to train on. Its classes, in the order of their names, number the labels.
        val: One for validation, which may lack some of those classes.
        predict: Folders to extract by name of source. A folder of several, such as ImageNet-C, gives `<name>/<path>`.
        image_size: Side of the square crop.
        crop_pct: Share of the shorter side that the central crop keeps; 1 for images that were cropped before.
        views: Extract so many random views of each image (crop, horizontal flip) instead of the central crop.
        vertical_flip: Flip half of the views upside down, as the paper's authors did.
        seed: Seed of the views.
        per_class: Extract only so many images of each class, the first by file name.
        batch_size: Images per batch.
        num_workers: Processes that read images.
    """

    def __init__(
        self,
        train: Path | None = None,
        val: Path | None = None,
        predict: dict[str, Path] | None = None,
        image_size: int = 256,
        crop_pct: float = 1.0,
        views: int = 0,
        vertical_flip: bool = False,
        seed: int = 0,
        per_class: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        if not 0 < crop_pct <= 1:
            raise UserError(f"`crop_pct` is a share of the shorter side, in (0, 1], and is {crop_pct:g}.")
        predicted = [
            FolderImages(root, source, image_size, crop_pct, views, seed, vertical_flip, per_class, tolerant=True)
            for name, folder in (predict or {}).items()
            for source, root in find_sources(name, folder).items()
        ]
        training = FolderImages(train, "train", image_size, crop_pct) if train else None
        classes = training.classes if training else None
        validation = FolderImages(val, "val", image_size, crop_pct, classes=classes) if val else None
        super().__init__(predicted, batch_size, num_workers, training, validation)


class CorruptedData(ImageData):
    """The images that another data module gives to `predict`, with every corruption at every severity.

    Args:
        data: The other data module, such as folders of images.
        corruptions: Names; by default the 15 of ImageNet-C and its 4 for validation.
        severities: Of 1 to 5; by default all.
    """

    def __init__(
        self, data: ImageData, corruptions: list[str] | None = None, severities: list[int] | None = None
    ) -> None:
        predicted = [
            CorruptedImages(images, corruption, severity)
            for images in data.predicted
            for corruption in corruptions or CORRUPTIONS
            for severity in severities or LEVELS
        ]
        super().__init__(predicted, data.batch_size, data.num_workers)
