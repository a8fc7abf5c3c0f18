"""An inverter in three lines of Python, with pictures in and out, and as a folder that can be published."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.inverter.identity import differences
from featinv_pl.inverter.inverter import Inverter
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.frozen import keep_products_in
from featinv_pl.nets.hub import INDEX, check_sums, find_folder, read_index, write_sums
from featinv_pl.nets.prior import Prior
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.types import Observation, to_uint8

CLASSIFIER, PRIOR, PREVIEW = "backbone", "prior", "preview"
OPTION = "`model`"
Side = Annotated[int, Field(ge=8, le=4096)]  # of an image, in pixels


class Index(TypedDict):
    """The entries of `model_index.json` from which a model is loaded."""

    backbone: str
    prior: str
    layer: str
    input_size: Side
    image_size: Side
    conditioning: Literal["spatial", "pooled"]
    hidden_channels: Annotated[int, Field(ge=1, le=100_000)]
    num_layers: Annotated[int, Field(ge=2, le=100)]
    sampler: dict[str, Any]
    digests: dict[str, str]


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
    def from_pretrained(cls, source: str | Path, classifier: Backbone | None = None) -> Self:
        """Load a model folder, as `featinv-pl export` and `import` write it, or its name on the hub, on the CPU.

        Args:
            source: The folder or the name.
            classifier: The classifier, where it was a module in Python: `Backbone.from_module(...)`.

        Raises:
            UserError: Files are missing or damaged, or the frozen parts are not those of the training.
        """
        folder = find_folder(str(source), ["*"], OPTION)
        contents = read_index(folder, OPTION)
        try:
            index = TypeAdapter(Index).validate_python(contents)
            sampler = Sampler.from_fields(index["sampler"])
        except ValidationError as error:
            found = " ".join(str(error).split())[:300]
            raise UserError(f"{OPTION}: '{folder / INDEX}' is damaged ({found}). Export the model again.") from error
        # Parts that came from a disk are in the folder; those of the hub are named.
        backbone, prior = (
            str(folder / name) if (folder / name).is_dir() else named
            for name, named in ((CLASSIFIER, index["backbone"]), (PRIOR, index["prior"]))
        )
        inverter = Inverter(
            classifier or Backbone(backbone, layer=index["layer"], input_size=index["input_size"]),
            Prior(prior),
            Encoder(index["hidden_channels"], index["num_layers"]),
            index["image_size"],
            index["conditioning"],
            sampler,
            LatentAutoencoder.load_folder(folder / PREVIEW, OPTION) if (folder / PREVIEW).is_dir() else None,
        )
        check_sums(folder, OPTION)
        if different := differences({**contents, **index["digests"]}, inverter.identity()):
            raise UserError(
                f"{OPTION}: the frozen parts of '{folder}' are not those that its control was trained with "
                f"({'; '.join(different)}). Copy the folder again, or export the model again."
            )
        inverter.control.load_pretrained(folder, OPTION)
        return cls(inverter)

    def save_pretrained(self, folder: Path) -> None:
        """Write a new folder: `encoder/`, `controlnet/`, `model_index.json`, frozen parts of this disk, and sums."""
        if self.dtype != torch.float32:
            raise UserError(f"This pipeline holds its weights in {self.dtype}. Save one in full precision.")
        folder.mkdir(parents=True)
        self.inverter.control.save_pretrained(folder)
        classifier, prior = self.inverter.classifier, self.inverter.prior
        if not classifier.network.published:
            classifier.save_pretrained(folder / CLASSIFIER)
        if Path(prior.source).exists():
            prior.save_pretrained(folder / PRIOR)
        if self.inverter.preview is not None:
            self.inverter.preview.vae.save_pretrained(folder / PREVIEW)
        (folder / INDEX).write_text(json.dumps(self.index(), indent=2) + "\n")
        write_sums(folder)

    def index(self) -> dict[str, Any]:
        """The content of `model_index.json`: all that `from_pretrained` needs besides weights."""
        inverter = self.inverter
        known = {name: value for name, value in inverter.identity().items() if name not in inverter.digests}
        return {
            "_class_name": "FeatInvPipeline",
            "_featinv_pl_version": version("featinv-pl"),
            CLASSIFIER: inverter.classifier.title,
            PRIOR: "/".join(Path(inverter.prior.source).parts[-2:]),
            **known,
            "sampler": asdict(inverter.sampler),
            "digests": inverter.digests,
        }

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

    def with_sampler(self, **changes: Any) -> Self:
        """Change how images are sampled, by fields of `Sampler`."""
        self.inverter.sampler = replace(self.inverter.sampler, **changes)
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
        """Reconstruct one or several pictures of any size, or feature maps (B, C, h, w).

        Returns:
            For each picture or map its `num_samples` images.
        """
        if isinstance(pictures, Image.Image):
            pictures = [pictures]
        features = pictures if isinstance(pictures, Tensor) else self.classify(self.crop(pictures))["features"]
        return [[as_picture(image) for image in self.reconstruct(one, num_samples, seed)] for one in features]


def as_picture(image: Tensor) -> Image.Image:
    """Convert an image (3, H, W) in [-1, 1] to a picture."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
