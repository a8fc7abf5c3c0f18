"""One image with its label and name, and how such samples become a batch."""

from typing import TypedDict

import torch
from torch import Tensor

from featinv_pl.types import ImageBatch


class ImageSample(TypedDict):
    """One entry of an `ImageBatch`."""

    images: Tensor
    """(3, H, W) in [-1, 1]."""
    labels: int
    """-1 where there is none."""
    source: str
    key: str


def collate_images(samples: list[ImageSample]) -> ImageBatch:
    """Stack samples to a batch."""
    return {
        "images": torch.stack([sample["images"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
        "source": [sample["source"] for sample in samples],
        "key": [sample["key"] for sample in samples],
    }
