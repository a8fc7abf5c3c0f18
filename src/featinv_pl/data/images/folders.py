"""Folders of images: ImageNet, its variants, and users' own."""

import os
from collections.abc import Iterator, Sequence
from math import floor
from pathlib import Path

import numpy as np
import torch
from timm.data import create_transform
from torchvision.transforms.v2 import functional as transforms

from featinv_pl.data.images.crops import RATIO, SCALE, random_view, take_view
from featinv_pl.data.images.datamodule import ImageData, ImageSample, ImageSource
from featinv_pl.data.images.layouts import NO_CLASS, find_sources, first_per_class, in_order, labelled_images
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
        # That of `Backbone.crop` too: a classifier is shown what its published accuracy was measured on.
        size = (3, image_size, image_size)
        self._central_crop = create_transform(size, interpolation="bicubic", crop_pct=crop_pct, normalize=False)
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
            sample["view"] = random_view(image, name, number, self.seed, self.vertical_flip)
            pixels = transforms.pil_to_tensor(take_view(image, sample["view"], self.image_size))
        else:
            pixels = self._central_crop(image)
        return {**sample, "images": from_uint8(pixels)}


class FolderData(ImageData):
    """Folders of images, as batches.

    Images lie in `<wnid>/` (ImageNet, ImageNet-A, ImageNet-R and any other subset), in `<number>/`
    (ImageNet-V2) or in `<class>/`, at any depth, or in the folder itself if they have no labels.

    Args:
        train: A folder to train on. Its classes, in the order of their names, number the labels.
        val: One for validation, which may lack some of those classes.
        predict: Folders by name of source, for extraction. A folder of several sources, such as
            ImageNet-C's `<corruption>/<severity>/<wnid>/`, gives `<name>/<corruption>/<severity>`.
        image_size: Side of the square crop.
        crop_pct: Share of the shorter side that the central crop keeps. Images that were cropped
            before, as those of ImageNet-C to 224 px, want 1 and that size.
        views: Extract so many random views of each image (crop, horizontal flip) in place of the
            central crop, as training wants it.
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
        if views < 0:
            raise UserError(f"`views` must be 0 (the central crop) or more, and is {views}.")
        if per_class is not None and per_class < 1:
            raise UserError(f"`per_class` must be at least 1, and is {per_class}.")
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
