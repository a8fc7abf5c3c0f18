"""Any images, corrupted on the fly."""

from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from featinv_pl.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from featinv_pl.data.images import ImageSample
from featinv_pl.errors import UserError
from featinv_pl.types import from_uint8, key_hash, to_uint8

LEVELS = len(next(iter(SEVERITIES.values()))[0])


class CorruptedImages(Dataset[ImageSample]):
    """The images of another source, corrupted: `<source>-corrupted/<corruption>/<severity>`.

    The random part belongs to an image's key, so it is the same in every run, order and process.

    Args:
        images: The other source, with a `source` that names it.
        corruption: A name in `CORRUPTIONS`.
        severity: 1 to 5.
    """

    def __init__(self, images: Dataset[ImageSample], corruption: str, severity: int) -> None:
        self.images, self.corruption, self.severity = images, corruption, severity
        self.source = f"{cast(Any, images).source}-corrupted/{corruption}/{severity}"

    def __len__(self) -> int:
        return len(cast(Any, self.images))

    def __getitem__(self, item: int) -> ImageSample:
        sample = self.images[item]
        pixels = to_uint8(sample["images"]).permute(1, 2, 0).numpy()
        corrupted = corrupt(pixels, self.corruption, self.severity, seed=key_hash(sample["key"]))
        images = from_uint8(torch.from_numpy(corrupted).permute(2, 0, 1))
        return {**sample, "images": images, "source": self.source}


class CorruptedData(LightningDataModule):
    """What another data module gives to `predict`, by every corruption at every severity.

    Args:
        data: The other data module, such as folders of images.
        corruptions: Names; by default the 15 of ImageNet-C and its 4 for validation.
        severities: 1 to 5.
    """

    def __init__(
        self,
        data: LightningDataModule,
        corruptions: list[str] | None = None,
        severities: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.data = data
        self.corruptions = list(CORRUPTIONS) if corruptions is None else corruptions
        self.severities = list(range(1, LEVELS + 1)) if severities is None else severities
        unknown = [name for name in self.corruptions if name not in CORRUPTIONS]
        if unknown:
            raise UserError(
                f"--data.corruptions: there is no corruption '{unknown[0]}'. Choose among: {', '.join(CORRUPTIONS)}."
            )
        if not self.corruptions or not set(self.severities) <= set(range(1, LEVELS + 1)) or not self.severities:
            raise UserError(f"--data.severities are among 1 to {LEVELS}, and are {self.severities}. Give at least one.")

    def predict_dataloader(self) -> list[DataLoader[ImageSample]]:
        """One loader for each source, corruption and severity."""
        return [
            DataLoader(
                CorruptedImages(loader.dataset, corruption, severity),
                batch_size=loader.batch_size,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
            )
            for loader in cast(list[DataLoader[ImageSample]], self.data.predict_dataloader())
            for corruption in self.corruptions
            for severity in self.severities
        ]
