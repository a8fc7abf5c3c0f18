"""Folders of images, one folder per class: how users with other images bring them."""

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from featinv_pl.data.images import ImageSample, collate_images
from featinv_pl.errors import UserError
from featinv_pl.types import from_uint8

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
ORDER_SEED = 0


class FolderImages(Dataset[ImageSample]):
    """Images below `<root>/<class>/`, in a fixed random order.

    The order is random so that any stretch of a shard set is a fair sample of its source, and fixed
    so that two runs agree. Classes are numbered in the order of their sorted names.

    Args:
        root: The folder.
        source: Name of the source in batches and scores.
        image_size: Side of the square crop.
        crop_pct: Share of the shorter side that the central crop keeps.
    """

    def __init__(self, root: Path, source: str, image_size: int, crop_pct: float = 1.0) -> None:
        if not root.is_dir():
            raise UserError(f"--data: there is no folder '{root}' for the source '{source}'. Check the path.")
        classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((root / name).iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not files:
            raise UserError(
                f"--data: no images below '{root}/<class>/'. Known suffixes: {', '.join(sorted(SUFFIXES))}."
            )
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(ORDER_SEED)).tolist()
        self.files = [files[index] for index in order]
        self.root, self.source, self.image_size, self.crop_pct = root, source, image_size, crop_pct

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> ImageSample:
        path, label = self.files[item]
        try:
            image = Image.open(path).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"--data: '{path}' cannot be read as an image ({error}). Remove or replace it.") from error
        short = round(self.image_size / self.crop_pct)
        image = transforms.resize(image, [short], transforms.InterpolationMode.BICUBIC)
        image = transforms.center_crop(image, [self.image_size, self.image_size])
        return {
            "images": from_uint8(transforms.pil_to_tensor(image)),
            "labels": label,
            "source": self.source,
            "key": path.relative_to(self.root).as_posix(),
        }


class FolderData(LightningDataModule):
    """Folders of images, as batches.

    Args:
        train: `<class>/<image>` to train on.
        val: The same, for validation.
        predict: The same, by name of source, for extraction.
        image_size: Side of the square crop.
        crop_pct: Share of the shorter side that the central crop keeps.
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
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers
        self.train = FolderImages(train, "train", image_size, crop_pct) if train else None
        self.val = FolderImages(val, "val", image_size, crop_pct) if val else None
        self.predicted = [FolderImages(root, name, image_size, crop_pct) for name, root in (predict or {}).items()]

    def train_dataloader(self) -> DataLoader[ImageSample]:
        """The training images, in a new order each epoch."""
        if self.train is None:
            raise UserError("--data.train: fit needs a folder of training images.")
        return self._loader(self.train, shuffle=True, drop_last=len(self.train) >= self.batch_size)

    def val_dataloader(self) -> list[DataLoader[ImageSample]]:
        """The validation images, if any."""
        return [] if self.val is None else [self._loader(self.val)]

    def predict_dataloader(self) -> list[DataLoader[ImageSample]]:
        """One loader for each folder of `predict`."""
        return [self._loader(images) for images in self.predicted]

    def _loader(self, images: FolderImages, shuffle: bool = False, drop_last: bool = False) -> DataLoader[ImageSample]:
        return DataLoader(
            images,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate_images,
        )
