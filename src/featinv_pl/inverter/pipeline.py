"""An inverter in three lines of Python, with pictures in and out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.inverter.model_folder import load_inverter, save_inverter
from featinv_pl.nets.frozen import keep_products_in
from featinv_pl.types import Observation, to_uint8


class FeatInvPipeline:
    """Reconstructs images from a picture's feature map, or from a map.

        pipeline = FeatInvPipeline.from_pretrained("folder-or-hub-name")
        [reconstructions] = pipeline(Image.open("cat.jpg"), num_samples=4)
        reconstructions[0].save("reconstruction.png")

    The `sampler` of its `inverter` may be replaced.
    """

    def __init__(self, inverter: Inverter) -> None:
        self.inverter = inverter.eval()
        self.dtype = torch.float32

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Load a model folder, as `featinv-pl export` and `import` write it, or one of the hub by its name."""
        return cls(load_inverter(source))

    def save_pretrained(self, folder: Path) -> None:
        """Write a new model folder; see `save_inverter`."""
        if self.dtype != torch.float32:
            raise UserError(f"This pipeline holds its weights in {self.dtype}. Save one in full precision.")
        save_inverter(self.inverter, folder)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move all networks.

        With a `dtype` of bfloat16, images are sampled in mixed precision from now on, and weights take half the memory.
        """
        self.inverter.to(device)
        if dtype is not None:
            for network in (self.inverter.prior, self.inverter.control):
                keep_products_in(network, dtype)
            self.dtype = dtype
        return self

    def crop(self, pictures: Sequence[Image.Image]) -> Tensor:
        """The classifier's crops of pictures of any size: (B, 3, H, W) in [-1, 1]."""
        return torch.stack([self.inverter.classifier.crop(picture) for picture in pictures])

    def classify(self, images: Tensor) -> Observation:
        """Run the classifier on images (B, 3, H, W) in [-1, 1]."""
        return self.inverter.classifier.classify(images.to(self.inverter.device))

    def reconstruct(self, features: Tensor, num_samples: int = 1, seed: int = 0) -> Tensor:
        """Reconstruct images (num_samples, 3, H, W), about [-1, 1], from one feature map (C, h, w).

        Noise depends on the seed and on the sample's number alone, so equal numbers of two maps start
        from equal noise, and their differences are due to the maps.
        """
        inverter = self.inverter
        shape = inverter.classifier.feature_shape
        if features.shape[0] != shape[0] or features.ndim != len(shape):
            raise UserError(f"The map has the shape {tuple(features.shape)}; this inverter reads {shape}.")
        maps = features.to(inverter.device).expand(num_samples, -1, -1, -1)
        keys = [str(number) for number in range(num_samples)]
        with torch.autocast(inverter.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return inverter.reconstruct(maps, keys, seed)

    def __call__(
        self, pictures: Image.Image | Sequence[Image.Image] | Tensor, num_samples: int = 1, seed: int = 0
    ) -> list[list[Image.Image]]:
        """Reconstruct pictures or feature maps.

        Args:
            pictures: One or several pictures of any size, or maps (B, C, h, w).
            num_samples: Images per picture or map.
            seed: Of the noise.

        Returns:
            For each picture or map its `num_samples` images.
        """
        if isinstance(pictures, Image.Image):
            pictures = [pictures]
        features = pictures if isinstance(pictures, Tensor) else self.classify(self.crop(pictures))["features"]
        return [[as_picture(image) for image in self.reconstruct(one, num_samples, seed)] for one in features]

    def with_sampler(self, **changes: Any) -> Self:
        """Change how images are sampled, by fields of `Sampler`."""
        self.inverter.sampler = replace(self.inverter.sampler, **changes)
        return self


def as_picture(image: Tensor) -> Image.Image:
    """Convert an image (3, H, W) in [-1, 1] to a picture."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
