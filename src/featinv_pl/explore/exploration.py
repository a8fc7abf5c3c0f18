"""What the explorations share: pictures classified, changed maps reconstructed, regions of maps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import default_collate

from featinv_pl.errors import UserError
from featinv_pl.inverter.pipeline import FeatInvPipeline, as_picture
from featinv_pl.pages.page import Report, Tile
from featinv_pl.pages.pictures import open_picture, prediction
from featinv_pl.types import Observation, predicted

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def classify(pipeline: FeatInvPipeline, pictures: Sequence[Image.Image]) -> Observation:
    """Classify P pictures of any size; images (P, 3, H, W), features (P, C, h, w), logits (P, K) are on the CPU."""
    return _on_cpu(pipeline.classify(pipeline.crop(pictures)))


def reconstruct_maps(
    pipeline: FeatInvPipeline, maps: Iterable[Tensor], num_samples: int = 1, seed: int = 0
) -> Observation:
    """Reconstruct each of S maps (C, h, w) n times, all from the same noise, and classify the images as bytes.

    On the CPU come images (S, n, 3, H, W) in [-1, 1], features (S, n, C, h, w) and logits (S, n, K).
    """
    found = [_on_cpu(pipeline.classify(pipeline.reconstruct(one, num_samples, seed))) for one in maps]
    return cast(Observation, default_collate(found))


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
