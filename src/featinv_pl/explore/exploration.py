"""What explorations share: maps of real images, pictures classified, changed maps reconstructed, regions of maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.transforms.v2.functional import InterpolationMode, resize
from tqdm import tqdm
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.bars import style
from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.data.shards.samples import Sample
from featinv_pl.errors import UserError
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.pages.page import Report, Tile, open_picture, prediction
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.types import Observation, from_uint8, predicted, to_uint8

Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{0,500}$")]  # for it is printed


class Origin(TypedDict):
    """The backbone that feature maps come from, and its layer."""

    backbone: Line
    backbone_digest: Line
    layer: Line
    feature_shape: list[int]


@dataclass(frozen=True)
class Samples:
    """Feature maps of real images."""

    features: Tensor  # (n, C, h, w), in half precision as they are stored
    labels: Tensor  # (n,), as the classifier counts them; -1 where it has no such class
    keys: list[str]  # names, which begin with that of the class's folder where there is one
    origin: Origin
    places: list[tuple[ShardSet, int]]  # the shard set of each sample, and its number there

    def maps(self, pooled: bool = False) -> Tensor:
        """The maps in single precision, or their means over locations (n, C, 1, 1)."""
        maps = self.features.float()
        return maps.mean((2, 3), keepdim=True) if pooled else maps

    def picture(self, index: int) -> Image.Image:
        shards, number = self.places[index]
        return as_picture(shards[number]["images"])

    def images(self, indices: Sequence[int]) -> Tensor:
        """Images (len(indices), 3, H, W) in [-1, 1]."""
        places = [self.places[index] for index in indices]
        return torch.stack([shards[number]["images"] for shards, number in places])

    def of_class(self, label: int | str) -> Tensor:
        """A boolean for each sample (n,): whether it has a label, or lies in the class folder of that name."""
        known = sorted(set(self.labels.tolist()))
        if str(label).removeprefix("-").isdecimal() and int(label) in known:
            return self.labels == int(label)
        chosen = torch.tensor([key.startswith(f"{label}/") for key in self.keys])
        if not chosen.any():
            many = f"{len(known)} labels from {known[0]} to {known[-1]}"
            names = many if len(known) > 20 else ", ".join(map(str, known))
            raise UserError(
                f"`between`: no sample has the label {label}. There are {names}. Names of class folders work as well."
            )
        return chosen


def read_samples(folders: Sequence[Path], num_images: int, option: str) -> Samples:
    """Read at most `num_images` of each shard set, evenly spaced over it; errors begin with `option`."""
    sets = [ShardSet(folder, folder.name, option) for folder in folders]
    first, *_ = origins = [_origin(shards) for shards in sets]
    found: list[Sample] = []
    places = []
    for folder, origin, shards in zip(folders, origins, sets, strict=True):
        if origin != first:
            raise UserError(
                f"{option}: '{folders[0]}' holds maps of {_described(first)}, and '{folder}' those of "
                f"{_described(origin)}. Give sets of one backbone and layer."
            )
        if not len(shards):
            raise UserError(f"{option}: the shard set '{folder}' has no samples. Extract features first.")
        chosen = np.linspace(0, len(shards) - 1, min(num_images, len(shards))).round().astype(int).tolist()
        maps = ShardSet(folder, folder.name, option, with_images=False)
        found += [maps.stored(number) for number in tqdm(chosen, **style(f"{folder}", "map"))]
        places += [(shards, number) for number in chosen]
    features = torch.stack([sample["features"] for sample in found])
    labels = torch.tensor([sample["labels"] for sample in found])
    return Samples(features, labels, [sample["key"] for sample in found], first, places)


def origin_of(pipeline: FeatInvPipeline) -> Origin:
    """The backbone and layer whose maps an inverter reads."""
    classifier = pipeline.inverter.classifier
    return Origin(
        backbone=classifier.title,
        backbone_digest=pipeline.inverter.digests["backbone"],
        layer=classifier.layer,
        feature_shape=list(classifier.feature_shape),
    )


def refuse_other_backbone(origin: Origin, pipeline: FeatInvPipeline, name: str) -> None:
    """Raise an error if maps come from another backbone or layer than an inverter reads; `name` is the argument's."""
    ours = origin_of(pipeline)
    if {**origin, "backbone": ""} != {**ours, "backbone": ""}:  # names of the same weights may differ
        raise UserError(
            f"{name} belongs to {_described(origin)}, and the model reads {_described(ours)}. "
            "Give what was made with the backbone of the model."
        )


def _origin(shards: ShardSet) -> Origin:
    made_by = cast(dict[str, Any], shards.manifest["provenance"])
    return cast(Origin, {name: made_by[name] for name in Origin.__annotations__})


def _described(origin: Origin) -> str:
    shape = "x".join(map(str, origin["feature_shape"]))
    return f"'{origin['backbone']}' (weights {origin['backbone_digest'][:8]}, layer {origin['layer']}, maps {shape})"


Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def classify(pipeline: FeatInvPipeline, pictures: Sequence[Image.Image]) -> Observation:
    """Classify P pictures of any size; images (P, 3, H, W), features (P, C, h, w), logits (P, K) are on the CPU."""
    return _on_cpu(pipeline.classify(pipeline.crop(pictures)))


def autoencode(pipeline: FeatInvPipeline, images: Tensor) -> Observation:
    """Encode and decode images (P, 3, H, W) by the prior's autoencoder, and classify them: the ceiling of fidelity."""
    return classified(pipeline, decode(pipeline, encode(pipeline, images)))


def encode(pipeline: FeatInvPipeline, images: Tensor) -> Tensor:
    """The latents of images (P, 3, H, W) in [-1, 1] of any size, without noise."""
    inverter, side = pipeline.inverter, pipeline.inverter.image_size
    sized = resize(images.to(pipeline.device), [side, side], InterpolationMode.BICUBIC)
    with torch.no_grad(), torch.autocast(pipeline.device.type, pipeline.dtype, pipeline.dtype != torch.float32):
        moments = inverter.prior.autoencoder.encode(from_uint8(to_uint8(sized)))
        mean, _ = moments.chunk(2, dim=1)
        return inverter.prior.autoencoder.sample(moments, torch.zeros_like(mean))


def decode(pipeline: FeatInvPipeline, latents: Tensor) -> Tensor:
    """The images (P, 3, H, W) of latents, about [-1, 1]."""
    with torch.no_grad(), torch.autocast(pipeline.device.type, pipeline.dtype, pipeline.dtype != torch.float32):
        return pipeline.inverter.decode(latents)


def classified(pipeline: FeatInvPipeline, images: Tensor) -> Observation:
    """Classify images (P, 3, H, W), on the CPU."""
    return _on_cpu(pipeline.classify(images))


def reconstruct_maps(
    pipeline: FeatInvPipeline,
    maps: Tensor | Sequence[Tensor],
    num_samples: int = 1,
    seed: int = 0,
    sampler: Sampler | None = None,
) -> Observation:
    """Reconstruct each of S maps (C, h, w) n times, all from the same noise, and classify the images as bytes.

    A `sampler` replaces the pipeline's own.
    On the CPU come images (S, n, 3, H, W) in [-1, 1], features (S, n, C, h, w) and logits (S, n, K).
    """
    found = pipeline.classify(pipeline.reconstruct(torch.stack([*maps]), num_samples, seed, sampler))
    images, features, logits = (
        one.unflatten(0, (-1, num_samples)) for one in (found["images"], found["features"], found["logits"])
    )
    return _on_cpu({"images": images, "features": features, "logits": logits})


def _on_cpu(seen: Observation) -> Observation:
    return {"images": seen["images"].cpu(), "features": seen["features"].cpu(), "logits": seen["logits"].cpu()}


@dataclass(frozen=True)
class Exploration(Report):
    """Reconstructions of changed feature maps, beside the pictures that the maps come from."""

    originals: Observation  # of P pictures; see `classify`
    found: Observation  # of S maps with n samples each; see `reconstruct_maps`


def tile(image: Tensor, logits: Tensor, *lines: str, expected: Tensor | None = None) -> Tile:
    """An image (3, H, W) above lines of text and its class, flagged where that is not the class of `expected` (K,)."""
    flagged = expected is not None and int(predicted(logits)) != int(predicted(expected))
    return Tile(as_picture(image), "\n".join([*lines, f"class {prediction(logits)}"]), flagged)


def box_mask(box: Box, size: tuple[int, int]) -> Tensor:
    """A mask (H, W) that is 1 inside a box of pixels and 0 outside."""
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise UserError(
            f"`box`: {','.join(map(str, box))} (top,left,height,width in pixels) is not within the classifier's crop "
            f"of {size[0]}x{size[1]} pixels. Give a box inside it."
        )
    mask = torch.zeros(size)
    mask[top : top + height, left : left + width] = 1
    return mask


def picture_mask(path: Path, original: Path, pipeline: FeatInvPipeline) -> Tensor:
    """A mask (H, W) in [0, 1] from a picture that is white inside, cropped as the original is."""
    mask, picture = open_picture(path, "`mask`"), open_picture(original)
    if mask.size != picture.size:
        raise UserError(
            f"`mask`: '{path}' has {mask.width}x{mask.height} pixels, and '{original}' has "
            f"{picture.width}x{picture.height}. Give a mask of the picture's size."
        )
    cropped = (pipeline.crop([mask])[0].mean(0) + 1) / 2
    if not cropped.any():
        raise UserError(f"`mask`: '{path}' is black within the classifier's crop. Paint white what to change.")
    return cropped


def location_weights(mask: Tensor, features: Tensor) -> Tensor:
    """The share (h, w) of each location of maps (..., h, w) whose pixels lie in a mask (H, W)."""
    return adaptive_avg_pool2d(mask.unsqueeze(0), (features.shape[-2], features.shape[-1]))[0]
