"""Images with their labels and names, and how extraction and training read them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from featinv_pl.data.order import Batches, ResumableData, cut
from featinv_pl.data.workers import loader, start_server
from featinv_pl.errors import UserError
from featinv_pl.types import ImageBatch, View


class ImageSample(TypedDict):
    """One entry of an `ImageBatch`."""

    images: Tensor
    """(3, H, W) in [-1, 1]."""
    labels: int
    """The place of the class among the source's `classes`; -1 where there is none."""
    class_name: str
    source: str
    key: str
    view: View | None
    unreadable: str


class ImageSource(Dataset[ImageSample], ABC):
    """Images of one source, in a fixed order.

    Attributes:
        source: Its name.
        num_images: Number of images, whatever the number of views.
        preparation: How an image becomes a sample, for the manifest.
        classes: Names of the classes that number the labels.
        views: Random views of each image, or 0 for the central crop alone. View 0 of all images comes
            first, then view 1 of all, so that any stretch is a fair sample.
    """

    source: str
    num_images: int
    preparation: str
    classes: tuple[str, ...] = ()
    views: int = 0

    @abstractmethod
    def names(self) -> Iterator[tuple[str, str]]:
        """Key of each image and name of its class, empty where there is none."""

    def __len__(self) -> int:
        return self.num_images * max(self.views, 1)

    def digest(self) -> str:
        """SHA-256 of keys and classes: two sources of the same digest hold the same samples in the same order."""
        sha256 = hashlib.sha256()
        for key, class_name in self.names():
            sha256.update(f"{key}\0{class_name}\n".encode())
        return sha256.hexdigest()


def collate_images(samples: list[ImageSample]) -> ImageBatch:
    """Stack samples to a batch."""
    batch: Any = {name: [cast(Any, sample)[name] for sample in samples] for name in samples[0]}
    stacked: ImageBatch = batch | {"images": torch.stack(batch["images"]), "labels": torch.tensor(batch["labels"])}
    return stacked


class ImageBatches(Dataset[ImageBatch]):
    """A source read a batch at a time: its index is the list of samples in a batch."""

    def __init__(self, images: ImageSource) -> None:
        self.images = images

    def __getitem__(self, numbers: Sequence[int]) -> ImageBatch:
        return collate_images([self.images[number] for number in numbers])


class ImageData(ResumableData, LightningDataModule):
    """What all data modules of images share.

    Args:
        predicted: The sources to extract features of, which `predict` reads one after the other.
        batch_size: Images per batch.
        num_workers: Processes that read images.
        train: What `fit` trains on.
        val: What `fit` validates on.

    Attributes:
        classes: Names of the classes that number the labels of `train` and `val`.
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
            start_server(type(self).__module__)
        # A process may have nothing left to extract of a source while others have.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.predicted, self.num_workers, self.train, self.val = predicted, num_workers, train, val
        self.classes = next((images.classes for images in (train, val) if images is not None), ())
        self._batches = {images.source: cut([range(len(images))], batch_size) for images in predicted}

    def extract_only(self, batches: dict[str, list[Sequence[int]]]) -> None:
        """Let `predict` read these samples of each batch by source, instead of all samples of all sources."""
        self._batches = batches

    def predict_dataloader(self) -> list[DataLoader[ImageBatch]]:
        """One loader for each source of which something is left to do."""
        return [
            loader(ImageBatches(images), Batches(self._batches[images.source]), self.num_workers)
            for images in self.predicted
            if images.source in self._batches
        ]

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """The training images in complete batches, in another order each epoch; too few for a batch are one."""
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
