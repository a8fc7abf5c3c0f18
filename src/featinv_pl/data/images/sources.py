"""Images with their labels and names, read one by one or a batch at a time.

Loader workers import this module and those of the sources, which do not wait for Lightning.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

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
