"""Images with labels and keys, read singly or a batch at a time. Loader workers import this: it knows no Lightning."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms.v2 import functional as transforms

from featinv_pl.data.images.layouts import NO_CLASS, divided, in_order, labelled_images
from featinv_pl.decoding import NoImageError, open_image
from featinv_pl.errors import UserError
from featinv_pl.types import ImageBatch, View, key_hash

ORDER_SEED = 0
SCALE, RATIO = [0.08, 1.0], [3 / 4, 4 / 3]  # torchvision's own, which the paper's authors use


class ImageSample(NamedTuple):
    """One entry of an `ImageBatch`."""

    images: Tensor  # (3, H, W), bytes
    labels: int
    class_name: str
    source: str
    key: str
    view: View | None = None
    unreadable: str = ""


class ImageSource(Dataset[ImageSample], ABC):
    """Images of one source, in a fixed order.

    View 0 of all images comes first, then view 1 of all, so that any stretch is a fair sample.
    """

    source: str
    num_images: int
    preparation: str  # of samples from images, for the manifest
    classes: tuple[str, ...] = ()  # by the label that numbers them
    views: int = 0  # random ones of each image, or 0 for the central crop alone

    @abstractmethod
    def names(self) -> Iterator[tuple[str, str]]:
        """Key of each image and name of its class, empty where there is none."""

    def __len__(self) -> int:
        return self.num_images * max(self.views, 1)

    def digest(self) -> str:
        """SHA-256 of keys and classes: two sources of the same digest hold the same samples in the same order."""
        listing = "".join(f"{key}\0{class_name}\n" for key, class_name in self.names())
        return hashlib.sha256(listing.encode()).hexdigest()


class AugmentedImages(ImageSource):
    """Another source's images, shifted by up to an eighth of their side, over black, and flipped or not, at random.

    So CIFAR-10 is trained on: by up to 4 of 32 pixels (He et al., arXiv 1512.03385, section 4.2). Item
    `epoch * num_images + n` is image n, changed by seed, epoch and key alone.
    """

    def __init__(self, images: ImageSource, seed: int) -> None:
        self.images, self.seed = images, seed
        self.source, self.num_images, self.preparation = images.source, len(images), images.preparation
        self.classes = images.classes

    def names(self) -> Iterator[tuple[str, str]]:
        return self.images.names()

    def __getitem__(self, item: int) -> ImageSample:
        epoch, number = divmod(item, self.num_images)
        sample = self.images[number]
        rng, side = np.random.default_rng((self.seed, epoch, key_hash(sample.key))), sample.images.shape[-1]
        margin = round(side / 8)
        top, left, flipped = rng.integers((2 * margin + 1, 2 * margin + 1, 2)).tolist()
        image = pad(sample.images, [margin] * 4)[:, top : top + side, left : left + side]
        return sample._replace(images=image.flip(2) if flipped else image.clone())


class ImageBatches(Dataset[ImageBatch]):
    """A source read a batch at a time, its images in bytes: its index is the list of samples in a batch."""

    def __init__(self, images: ImageSource) -> None:
        self.images = images

    def __getitem__(self, numbers: Sequence[int]) -> ImageBatch:
        columns = map(list, zip(*(self.images[number] for number in numbers), strict=True))
        batch: Any = dict(zip(ImageSample._fields, columns, strict=True))
        stacked: ImageBatch = batch | {"images": torch.stack(batch["images"]), "labels": torch.tensor(batch["labels"])}
        return stacked


class FileImages(ImageSource):
    """Images in files of any kind, cropped centrally or in random views. A view is a function of seed, key and number.

    Args:
        listed: Key of each image and name of its class.
        source: Name of the source in batches and scores.
        tolerant: Give a black image, with the reason beside it, in place of one that cannot be read.
        classes: Names of the classes that number the labels, if not those of the images themselves: a validation set
            may lack some of training's. An image of any other class has the label -1.
    """

    def __init__(
        self,
        listed: Sequence[tuple[str, str]],
        source: str,
        image_size: int,
        crop_pct: float = 1.0,
        views: int = 0,
        seed: int = 0,
        vertical_flip: bool = False,
        tolerant: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        # Arrays, because Python's own objects would be copied into every worker as soon as it counts references.
        self._names, self._class_names = (np.array([os.fsencode(one[part]) for one in listed]) for part in (0, 1))
        own = in_order({name for _, name in listed} - {NO_CLASS})
        self.classes = tuple(own if classes is None else classes)
        self._labels = {name: label for label, name in enumerate(self.classes)}
        self.source, self.num_images, self.image_size = source, len(listed), image_size
        self.views, self.seed, self.vertical_flip, self.tolerant = views, seed, vertical_flip, tolerant
        # As `Backbone.crop`, by timm: a classifier gets what its published accuracy was measured on.
        resize = Resize(resized := floor(image_size / crop_pct), InterpolationMode.BICUBIC)
        self._central_crop = Compose([resize, CenterCrop(image_size), PILToTensor()])
        flips = "horizontal and vertical" if vertical_flip else "horizontal"
        whole = f" of {resized}" if crop_pct < 1 else ""
        self.preparation = f"central crop of {crop_pct:g}, {image_size}{whole} px, bicubic"
        if views:
            area = "random crop of 0.08 to 1 of the area, aspect 0.75 to 1.33"
            self.preparation = f"{views} views of seed {seed}: {area}, {image_size} px, bicubic, {flips} flips"

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Decode an image; raises NoImageError."""

    def named(self, key: str) -> str:
        """What an error calls an image."""
        return key

    def names(self) -> Iterator[tuple[str, str]]:
        return zip(map(os.fsdecode, self._names), map(os.fsdecode, self._class_names), strict=True)

    def __getitem__(self, item: int) -> ImageSample:
        number, index = divmod(item, self.num_images)
        name, class_name = os.fsdecode(self._names[index]), os.fsdecode(self._class_names[index])
        label, key = self._labels.get(class_name, -1), f"{name}#{number}" if self.views else name
        black = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        sample = ImageSample(black, label, class_name, self.source, key)
        try:
            image = self.open(index)
        except NoImageError as error:
            if self.tolerant:
                return sample._replace(unreadable=str(error))
            named = self.named(name)
            raise UserError(f"`data`: '{named}' cannot be read as an image ({error}). Remove it.") from error
        if not self.views:
            return sample._replace(images=self._central_crop(image))
        view, cut = self._random_view(image, name, number)
        return sample._replace(images=transforms.pil_to_tensor(cut), view=view)

    def _random_view(self, image: Image.Image, key: str, number: int) -> tuple[View, Image.Image]:
        # Of the key alone, so that a view does not depend on the process that makes it.
        digest = hashlib.sha256(f"{self.seed}/{number}/{key}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            crop = RandomResizedCrop.get_params(image, SCALE, RATIO)
            horizontal, vertical = (torch.rand(2) < 0.5).tolist()
        image = transforms.resized_crop(image, *crop, [self.image_size] * 2, InterpolationMode.BICUBIC)
        if horizontal:
            image = transforms.horizontal_flip(image)
        if vertical and self.vertical_flip:
            image = transforms.vertical_flip(image)
        flips = "h" * horizontal + "v" * (vertical and self.vertical_flip)
        return {"number": number, "crop": crop, "flips": flips}, image


class FolderImages(FileImages):
    """Images of a folder, in a fixed random order; `layouts` says how they are found and what their classes are.

    Any stretch of it is a fair sample. `FileImages` and `FolderData` have more arguments.

    Args:
        part: Only one part of the images, and the share that is held out; see `layouts.divided`.
    """

    def __init__(
        self,
        root: Path,
        source: str,
        image_size: int,
        crop_pct: float = 1.0,
        per_class: int | None = None,
        part: tuple[str, float] | None = None,
        **options: Any,
    ) -> None:
        images = labelled_images(root, per_class)
        if part:
            images = divided(images, held_out=part[1], part=part[0])
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(ORDER_SEED)).tolist()
        super().__init__([images[number] for number in order], source, image_size, crop_pct, **options)
        self.root = root

    def open(self, index: int) -> Image.Image:
        return open_image(self.root / os.fsdecode(self._names[index]))

    def named(self, key: str) -> str:
        return str(self.root / key)
