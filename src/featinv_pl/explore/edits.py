"""Changes to feature maps: a direction added, a component scaled, a region pasted; everywhere or in a part.

All are functions of tensors: maps (B, C, h, w), and the weight (h, w) in [0, 1] with which each location is changed.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from featinv_pl.errors import UserError
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.pages.pictures import open_picture

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def add(features: Tensor, direction: Tensor, strength: float, weight: Tensor) -> Tensor:
    """Add a direction (C, h, w) or (C, 1, 1) to maps, `strength` times."""
    return features + strength * weight * direction


def scale(features: Tensor, part: Tensor, factor: float, weight: Tensor) -> Tensor:
    """Scale one part (B, C, h, w) of maps, such as what an NMF component contributes; 0 removes it."""
    return features + (factor - 1) * weight * part


def paste(features: Tensor, region: Tensor, weight: Tensor) -> Tensor:
    """Replace a region of maps by that of others; where the weight is a fraction, mix them."""
    return features + weight * (region - features)


def lerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """A point on the straight line between two maps: the first at 0, the second at 1."""
    return first + share * (second - first)


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """A point between two maps that keeps norms: at each location the vector turns, and its norm changes evenly.

    The spherical interpolation of Shoemake (Animating Rotation with Quaternion Curves, 1985), of the directions
    along the channels; norms are interpolated linearly. Opposite or equal directions go straight.
    """
    one, two = first.double(), second.double()  # the angle between similar vectors loses half the digits
    norms = one.norm(dim=-3, keepdim=True), two.norm(dim=-3, keepdim=True)
    start, end = normalize(one, dim=-3), normalize(two, dim=-3)
    angle = (start * end).sum(dim=-3, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    turned = (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / sine
    straight = (sine < 1e-6) | (norms[0] == 0) | (norms[1] == 0)
    return torch.where(straight, lerp(one, two, share), turned * lerp(*norms, share)).to(first.dtype)


def box_mask(box: Box, size: tuple[int, int]) -> Tensor:
    """A mask (H, W) that is 1 inside a box of pixels and 0 outside.

    Raises:
        UserError: The box has no area, or reaches outside the image.
    """
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
    """A mask (H, W) in [0, 1] from a picture that is white inside, cropped as the original is.

    Raises:
        UserError: The picture is of another size than the original, or black.
    """
    mask, picture = open_picture(path, "`mask`"), open_picture(original)
    if mask.size != picture.size:
        raise UserError(
            f"`mask`: '{path}' has {mask.width}x{mask.height} pixels, and '{original}' has "
            f"{picture.width}x{picture.height}. Give a mask of the picture's size."
        )
    cropped = (pipeline.crop([mask])[0].mean(0) + 1) / 2
    if not cropped.any():
        raise UserError(
            f"`mask`: '{path}' is black within the classifier's crop, so nothing would change. "
            "Paint white what to change."
        )
    return cropped


def location_weights(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share (h, w) of each location's pixels that lie in a mask (H, W)."""
    return adaptive_avg_pool2d(mask.unsqueeze(0), grid)[0]


def refuse_overflow(features: Tensor, option: str) -> None:
    """Raise an error if maps exceed half precision, in which they are stored and computed on GPUs."""
    if not bool((features.abs() <= torch.finfo(torch.half).max).all()):  # false for NaN, too
        largest = features.abs().max().item()
        raise UserError(
            f"{option}: the edited map reaches {largest:.3g}, and half precision ends at "
            f"{torch.finfo(torch.half).max:.0f}. Give smaller values."
        )
