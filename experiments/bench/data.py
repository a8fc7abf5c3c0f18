"""Random samples in the shapes of stored ones: how fast shards are read is measured elsewhere."""

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, default_collate

from featinv_pl.sampling.noise import Draws


class RandomSamples(Dataset[dict[str, Any]]):
    """As many samples as anybody could want."""

    def __init__(self, feature_shape: tuple[int, int, int], image_size: int) -> None:
        self.feature_shape, self.image_size = feature_shape, image_size

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, item: int) -> dict[str, Any]:
        if item >= len(self):
            raise IndexError(item)
        size = self.image_size
        return {
            "images": torch.rand(3, size, size) * 2 - 1,
            "features": torch.randn(self.feature_shape),
            "moments": torch.randn(8, size // 8, size // 8),
            "key": str(item),
        }


class RandomData(LightningDataModule):
    """Batches of random samples.

    Args:
        feature_shape: (C, h, w) of the backbone's maps.
        image_size: Side of the images.
        batch_size: Samples per batch.
    """

    manifests: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, feature_shape: tuple[int, int, int] = (1024, 9, 9), image_size: int = 256, batch_size: int = 1
    ) -> None:
        super().__init__()
        self.samples, self.batch_size = RandomSamples(feature_shape, image_size), batch_size

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """All of them."""
        return DataLoader(self.samples, self.batch_size, collate_fn=self._collate)

    def _collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """With what a training step draws, as FeatureShards has it."""
        batch: dict[str, Any] = default_collate(samples)
        drawn = torch.initial_seed(), 0, 1000
        channels, *grid = batch["moments"].shape[1:]
        batch["noise"], batch["timesteps"], batch["chances"] = Draws(*drawn)(batch["key"], (channels // 2, *grid))
        return {**batch, "drawn": drawn}
