"""A trained inverter as a folder that can be published, and as three lines of Python."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.inverter.identity import Settings, differences, identity
from featinv_pl.nets.frozen import keep_products_in
from featinv_pl.nets.sources import INDEX, find_folder, read_index, write_sums
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.tasks.inversion import FeatureInversion
from featinv_pl.types import Observation, to_uint8

BACKBONE, PRIOR = "backbone", "prior"


class Index(Settings):
    """What `model_index.json` holds that a model is loaded by."""

    backbone: str
    prior: str
    sampler: dict[str, Any]
    digests: dict[str, str]


INDEX_TYPE = TypeAdapter(Index)


class FeatInvPipeline:
    """Draws images from a picture's feature map, or from a map.

        pipeline = FeatInvPipeline.from_pretrained("folder-or-hub-name")
        [drawn] = pipeline(Image.open("cat.jpg"), num_samples=4)
        drawn[0].save("reconstruction.png")

    Args:
        inversion: The inverter, with its frozen parts.

    Attributes:
        inversion: The same, whose `sampler` may be replaced.
    """

    def __init__(self, inversion: FeatureInversion) -> None:
        self.inversion = inversion.eval()
        self.dtype = torch.float32

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Load a model folder, as `featinv-pl export` and `import` write it.

        Args:
            source: The folder, or its name on the hub.
        """
        folder = find_folder(str(source), ["*"], "--model")
        contents = read_index(folder, "--model")
        try:
            index = INDEX_TYPE.validate_python(contents)
            sampler = Sampler.from_fields(index["sampler"])
        except ValidationError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"--model: '{folder / INDEX}' is damaged ({reason}). Export the model anew.") from error
        # Parts that came from a disk lie in the folder; those of the hub are named.
        backbone, prior = (
            str(folder / name) if (folder / name).is_dir() else named
            for name, named in ((BACKBONE, index["backbone"]), (PRIOR, index["prior"]))
        )
        arguments: Any = {name: value for name, value in index.items() if name in Settings.__annotations__}
        inversion = FeatureInversion(backbone, prior, control=folder, sampler=sampler, **arguments)
        if different := differences({**contents, **index["digests"]}, identity(inversion)):
            raise UserError(
                f"--model: the frozen parts of '{folder}' are not those that its control was trained with "
                f"({'; '.join(different)}). Copy the folder again, or export the model anew."
            )
        return cls(inversion)

    def save_pretrained(self, folder: Path) -> None:
        """Write a model folder: `encoder/`, `controlnet/`, `model_index.json`, frozen parts of this disk, and sums.

        Args:
            folder: Must not exist.
        """
        inversion = self.inversion
        if self.dtype != torch.float32:
            raise UserError(f"This pipeline holds its weights in {self.dtype}. Save one in full precision.")
        folder.mkdir(parents=True)
        inversion.control.save_pretrained(folder)
        backbone, prior = inversion.backbone, inversion.prior
        if Path(backbone.name).exists() or backbone.weights != "pretrained":
            backbone.save_pretrained(folder / BACKBONE)
        if Path(prior.source).exists():
            prior.save_pretrained(folder / PRIOR)
        (folder / INDEX).write_text(json.dumps(self.index, indent=2) + "\n")
        write_sums(folder)

    @property
    def index(self) -> dict[str, Any]:
        """What `from_pretrained` needs besides weights."""
        inversion = self.inversion
        known = {name: value for name, value in identity(inversion).items() if name not in inversion.frozen}
        return {
            "_class_name": type(self).__name__,
            "_featinv_pl_version": version("featinv-pl"),
            BACKBONE: inversion.backbone.title,
            PRIOR: "/".join(Path(inversion.prior.source).parts[-2:]),
            **known,
            "sampler": asdict(inversion.sampler),
            "digests": inversion.frozen,
        }

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move all networks.

        Args:
            device: Where to.
            dtype: With bfloat16, images are from now on drawn in mixed precision, and weights take half the memory.
        """
        self.inversion.to(device)
        if dtype is not None:
            for network in (self.inversion.prior, self.inversion.control):
                keep_products_in(network, dtype)
            self.dtype = dtype
        return self

    def crop(self, pictures: Sequence[Image.Image]) -> Tensor:
        """What the classifier sees of pictures of any size: (B, 3, H, W) in [-1, 1]."""
        return torch.stack([self.inversion.backbone.crop(picture) for picture in pictures])

    @torch.no_grad()
    def classify(self, images: Tensor) -> Observation:
        """Send images (B, 3, H, W) in [-1, 1] through the classifier."""
        return self.inversion.backbone.classify(images.to(self.inversion.device))

    @torch.no_grad()
    def reconstruct(self, features: Tensor, num_samples: int = 1, seed: int = 0) -> Tensor:
        """Draw images from one feature map.

        Noise depends on the seed and on the sample's number alone, so equal numbers of two maps start
        from equal noise, and what differs between them is the maps' doing.

        Args:
            features: (C, h, w).
            num_samples: How many images.
            seed: Of the noise.

        Returns:
            (num_samples, 3, H, W), about [-1, 1].
        """
        inversion = self.inversion
        shape = inversion.backbone.feature_shape
        if features.shape[0] != shape[0] or features.ndim != len(shape):
            raise UserError(f"The map has the shape {tuple(features.shape)}; this inverter reads {shape}.")
        maps = features.to(inversion.device).expand(num_samples, -1, -1, -1)
        keys = [str(number) for number in range(num_samples)]
        with torch.autocast(inversion.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return inversion.reconstruct(maps, keys, seed, inversion.sampler)

    def __call__(
        self, pictures: Image.Image | Sequence[Image.Image] | Tensor, num_samples: int = 1, seed: int = 0
    ) -> list[list[Image.Image]]:
        """Reconstruct pictures, or draw from feature maps.

        Args:
            pictures: One or several pictures of any size, or maps (B, C, h, w).
            num_samples: Images per picture or map.
            seed: Of the noise.

        Returns:
            For each picture or map its `num_samples` images.
        """
        if isinstance(pictures, Tensor):
            features = pictures
        else:
            several = [pictures] if isinstance(pictures, Image.Image) else pictures
            features = self.classify(self.crop(several))["features"]
        return [[as_picture(image) for image in self.reconstruct(one, num_samples, seed)] for one in features]

    def with_sampler(self, **changes: Any) -> Self:
        """Change how images are drawn, by fields of `Sampler`."""
        self.inversion.sampler = replace(self.inversion.sampler, **changes)
        return self


def as_picture(image: Tensor) -> Image.Image:
    """Turn an image (3, H, W) in [-1, 1] into a picture."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
