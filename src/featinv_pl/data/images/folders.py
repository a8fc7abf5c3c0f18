"""Folders of images: ImageNet, its variants, and users' own."""

import os
from collections.abc import Iterator, Sequence
from math import floor
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms.v2 import functional as transforms

from featinv_pl.data.images.crops import RATIO, SCALE, random_view, take_view
from featinv_pl.data.images.layouts import NO_CLASS, first_per_class, in_order, labelled_images
from featinv_pl.data.images.sources import ImageSample, ImageSource
from featinv_pl.decoding import NoImageError, open_image
from featinv_pl.errors import UserError
from featinv_pl.types import from_uint8

ORDER_SEED = 0


class FolderImages(ImageSource):
    """Images of one source, in a fixed random order; `layouts` says how they are found and what their classes are.

    The order is random so that any stretch of a shard set is a fair sample of its source, and fixed
    so that two runs agree.

    Args:
        root: The folder.
        source: Name of the source in batches and scores.
        image_size: Side of the square crop.
        crop_pct: Share of the shorter side that the central crop keeps.
        views: Random views of each image, or 0 for the central crop alone.
        seed: Seed of the views.
        vertical_flip: Flip half of the views upside down.
        per_class: Only so many images of each class, the first by file name.
        tolerant: Give a black image, with the reason beside it, in place of one that cannot be read.
        classes: Names of the classes that number the labels, if not those of the folder itself: a validation folder
            may lack some of training's. An image of any other class has the label -1.
    """

    def __init__(
        self,
        root: Path,
        source: str,
        image_size: int,
        crop_pct: float = 1.0,
        views: int = 0,
        seed: int = 0,
        vertical_flip: bool = False,
        per_class: int | None = None,
        tolerant: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        images = labelled_images(root)
        if per_class is not None:
            images = first_per_class(images, per_class)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(ORDER_SEED)).tolist()
        # Arrays, because Python's own objects would be copied into every worker as soon as it counts references.
        self._names = np.array([os.fsencode(images[index][0]) for index in order])
        self._class_names = in_order({name for _, name in images})
        places = {name: place for place, name in enumerate(self._class_names)}
        self._places = np.array([places[images[index][1]] for index in order])
        named = [name for name in self._class_names if name != NO_CLASS]
        self.classes = tuple(named if classes is None else classes)
        self._labels = {name: label for label, name in enumerate(self.classes)}
        self.root, self.source, self.num_images, self.image_size = root, source, len(images), image_size
        self.views, self.seed, self.vertical_flip, self.tolerant = views, seed, vertical_flip, tolerant
        # As `Backbone.crop`, by timm: a classifier gets what its published accuracy was measured on.
        resize = Resize(floor(image_size / crop_pct), InterpolationMode.BICUBIC)
        self._central_crop = Compose([resize, CenterCrop(image_size), PILToTensor()])
        if views:
            flips = "horizontal and vertical" if vertical_flip else "horizontal"
            self.preparation = (
                f"{views} views of seed {seed}: random crop of {SCALE[0]:g} to {SCALE[1]:g} of the area, aspect "
                f"{RATIO[0]:.2f} to {RATIO[1]:.2f}, {image_size} px, bicubic, {flips} flips"
            )
        else:
            whole = f" of {floor(image_size / crop_pct)}" if crop_pct < 1 else ""
            self.preparation = f"central crop of {crop_pct:g}, {image_size}{whole} px, bicubic"

    def names(self) -> Iterator[tuple[str, str]]:
        for name, place in zip(self._names, self._places, strict=True):
            yield os.fsdecode(name), self._class_names[place]

    def __getitem__(self, item: int) -> ImageSample:
        number, index = divmod(item, self.num_images)
        name, class_name = os.fsdecode(self._names[index]), self._class_names[self._places[index]]
        sample: ImageSample = {
            "images": torch.full((3, self.image_size, self.image_size), -1.0),
            "labels": self._labels.get(class_name, -1),
            "class_name": class_name,
            "source": self.source,
            "key": f"{name}#{number}" if self.views else name,
            "view": None,
            "unreadable": "",
        }
        try:
            image = open_image(self.root / name)
        except NoImageError as error:
            if not self.tolerant:
                raise UserError(
                    f"`data`: '{self.root / name}' cannot be read as an image ({error}). Remove or replace it."
                ) from error
            return {**sample, "unreadable": str(error)}
        if self.views:
            view = random_view(image, name, number, self.seed, self.vertical_flip)
            sample["view"], pixels = view, transforms.pil_to_tensor(take_view(image, view, self.image_size))
        else:
            pixels = self._central_crop(image)
        return {**sample, "images": from_uint8(pixels)}
