"""Images with their labels and names, and how extraction and training read them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypedDict

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
        classes: Names of the classes that number the labels.
        views: Random views of each image, or 0 for the central crop alone. View 0 of all images comes
            first, then view 1 of all, so that any stretch is a fair sample.
    """

    source: str
    classes: tuple[str, ...] = ()
    views: int = 0

    @abstractmethod
    def names(self) -> Iterator[tuple[str, str]]:
        """Key of each image and name of its class, empty where there is none."""

    @property
    @abstractmethod
    def num_images(self) -> int:
        """Number of images, whatever the number of views."""

    @property
    @abstractmethod
    def preparation(self) -> str:
        """How an image becomes a sample, for the manifest."""

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
    return {
        "images": torch.stack([sample["images"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
        "class_name": [sample["class_name"] for sample in samples],
        "source": [sample["source"] for sample in samples],
        "key": [sample["key"] for sample in samples],
        "view": [sample["view"] for sample in samples],
        "unreadable": [sample["unreadable"] for sample in samples],
    }


class ImageBatches(Dataset[ImageBatch]):
    """A source read a batch at a time: its index is the list of samples in a batch."""

    def __init__(self, images: ImageSource) -> None:
        self.images = images

    def __getitem__(self, numbers: Sequence[int]) -> ImageBatch:
        return collate_images([self.images[number] for number in numbers])


class ImageData(ResumableData, LightningDataModule):
    """What all data modules of images share: sources to extract features of.

    Args:
        predicted: The sources, which `predict` reads one after the other.
        batch_size: Images per batch.
        num_workers: Processes that read images.

    Attributes:
        batches: The samples of each batch that `predict` reads, by source: at first all, of which
            `ShardWriter` leaves what this process has still to compute.
    """

    def __init__(self, predicted: Sequence[ImageSource], batch_size: int, num_workers: int = 0) -> None:
        super().__init__(batch_size)
        if num_workers:
            start_server(type(self).__module__)
        # A process may have nothing left to extract of a source while others have.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.predicted, self.num_workers = predicted, num_workers
        self.batches = {images.source: cut([range(len(images))], batch_size) for images in predicted}

    def predict_dataloader(self) -> list[DataLoader[ImageBatch]]:
        """One loader for each source of which something is left to do."""
        return [
            loader(ImageBatches(images), Batches(self.batches[images.source]), self.num_workers, again=False)
            for images in self.predicted
            if images.source in self.batches
        ]

    def training_images(self) -> ImageSource | None:
        """What `fit` trains on, if anything."""
        return None

    def validation_images(self) -> ImageSource | None:
        """What `fit` validates on, if anything."""
        return None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that number the labels of both: those of training, where there is some."""
        images = self.training_images() or self.validation_images()
        return () if images is None else images.classes

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """The training images, in a new order each epoch."""
        images = self.training_images()
        if images is None:
            raise UserError("--data.train: fit needs a folder of training images.")
        return self.training_loader(images)

    def val_dataloader(self) -> list[DataLoader[ImageBatch]]:
        """The validation images, if any."""
        images = self.validation_images()
        return [] if images is None else [self.evaluation_loader(images)]

    def training_loader(self, images: ImageSource) -> DataLoader[ImageBatch]:
        """Shuffled anew each epoch, in whole batches; of fewer images than a batch all are one."""
        self.batch_size = min(self.batch_size, max(len(images) // self.rank[1], 1))
        batches = self.training_batches([len(images)], torch.initial_seed())
        return loader(ImageBatches(images), batches, self.num_workers, again=True)

    def evaluation_loader(self, images: ImageSource) -> DataLoader[ImageBatch]:
        """In order."""
        batches = self.evaluation_batches(len(images), images.source)
        return loader(ImageBatches(images), batches, self.num_workers, again=True)
