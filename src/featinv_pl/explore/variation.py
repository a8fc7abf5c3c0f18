"""How samples vary: their variance by frequency, colour, position and region, and that of properties of images."""

from math import log2, nan

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.segmentation import slic
from torch import Tensor

Key = tuple[str, str]
"""A group and one of its parts, such as `colour` and `luma`."""
PARTS, PROPERTIES = ("frequency", "colour", "position"), "property"  # the parts of a group add up to the variance
REGIONS = 12  # about as many segments of a picture
GREY = 1 / 255  # an image whose mean colour is less than that from grey has no hue
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]


def squared_deviations(values: Tensor) -> Tensor:
    """(n,) of samples (n, ...), summed over what a sample consists of: their mean is the unbiased variance.

    Samples with NaN do not count, and are NaN; all are, if fewer than two count.
    """
    values = values.flatten(1)
    known = values.isfinite().all(1)
    count = int(known.sum())
    factor = count / (count - 1) if count > 1 else nan
    return (values - values[known].mean(0)).square().sum(1) * factor


def deviations(images: Tensor) -> dict[Key, Tensor]:
    """Squared deviations (n,) of n images (n, 3, H, W) in [-1, 1], by part of each group, and of properties.

    Parts are of pixels in [0, 1], averaged over pixels and colours, so that those of a group add up to the variance of
    pixels. Frequencies are in cycles per image, in octaves of the radius. Luma is the mean of red,
    green and blue, and chroma what is left, so that the two are orthogonal. Positions are the cells of a grid of
    three by three.
    """
    pixels = images.double() / 2
    centred = pixels - pixels.mean(0)
    height, width = images.shape[-2:]
    unbiased = len(images) / (len(images) - 1) / centred[0].numel() if len(images) > 1 else nan
    found: dict[Key, Tensor] = {}

    power = torch.fft.fft2(centred, norm="ortho").abs().square().sum(1).flatten(1) * unbiased
    octaves, names = _octaves(height, width)
    bands = power.new_zeros(len(power), len(names)).index_add_(1, octaves.flatten(), power)
    found |= {("frequency", name): bands[:, number] for number, name in enumerate(names)}

    squares = centred.square().sum(1) * unbiased
    luma = 3 * centred.mean(1).square().sum((1, 2)) * unbiased
    found |= {("colour", "luma"): luma, ("colour", "chroma"): squares.sum((1, 2)) - luma}

    rows, columns = (torch.arange(side) * 3 // side for side in (height, width))
    cells = (rows[:, None] * 3 + columns).flatten()
    places = squares.new_zeros(len(squares), 9).index_add_(1, cells, squares.flatten(1))
    found |= {("position", name): places[:, number] for number, name in enumerate(PLACES)}
    return found | {(PROPERTIES, name): squared_deviations(values) for name, values in properties(images).items()}


def properties(images: Tensor) -> dict[str, Tensor]:
    """Properties (n, d) of images (n, 3, H, W) in [-1, 1].

    `hue`: of the mean colour, as a point on the circle; NaN of a grey image. `brightness`: the mean. `background`: the
    mean colour of the border, an eighth of the side wide, less that of the central half of each side. `texture scale`:
    the mean of log2 of the frequency, weighted by the power of luma. `left and right`: the mean colour of the right
    half less that of the left.
    """
    pixels = (images.double() + 1) / 2
    height, width = images.shape[-2:]
    means = pixels.mean((2, 3))
    # Two axes that are orthogonal to grey and to each other, as those of opponent colours.
    axes = means.new_tensor([[1, -1, 0], [0.5, 0.5, -1]]).T
    opponent = means @ (axes / axes.norm(dim=0))
    norms = opponent.norm(dim=1, keepdim=True)
    hue = (opponent / norms).where(norms >= GREY, nan)

    border = torch.ones(height, width, dtype=torch.bool)
    border[height // 8 : height - height // 8, width // 8 : width - width // 8] = False
    centre = pixels[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4]

    radius = _radius(height, width)
    power = torch.fft.fft2(pixels.mean(1)).abs().square() * (radius > 0) + 1e-12
    scale = (power * radius.clamp(min=1).log2()).sum((1, 2)) / power.sum((1, 2))
    sides = [half.mean((2, 3)) for half in (pixels[..., : width // 2], pixels[..., width - width // 2 :])]
    return {
        "hue": hue,
        "brightness": means.mean(1, keepdim=True),
        "background": pixels[:, :, border].mean(2) - centre.mean((2, 3)),
        "texture scale": scale[:, None],
        "left and right": sides[1] - sides[0],
    }


def regions(picture: NDArray[np.uint8], variances: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Segments of a picture (H, W, 3) by SLIC (Achanta et al., 2012), and what of a variance (H, W) lies in each.

    Returns:
        The number of each pixel's segment (H, W), and for each segment its share of the variance and of the pixels
        (segments, 2).
    """
    labels = slic(picture, REGIONS, start_label=0)
    sums = np.stack([np.bincount(labels.flat, weights) for weights in (variances.numpy().flat, np.ones(labels.size))])
    return labels, (sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)).T


def _radius(height: int, width: int) -> Tensor:
    """The frequency (H, W) of each coefficient, in cycles per image."""
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) * side for side in (height, width))
    return torch.hypot(*torch.meshgrid(rows, columns, indexing="ij"))


def _octaves(height: int, width: int) -> tuple[Tensor, list[str]]:
    """The band (H, W) of each coefficient, and the bands' names: 0, then octaves up to half of what pixels resolve."""
    last = max(1, int(log2(min(height, width) / 2)))
    bands = (_radius(height, width).clamp(min=0.5).log2().floor().long() + 1).clamp(max=last)
    names = ["0", *(f"{2**number} to {2 ** (number + 1)}" for number in range(last - 1)), f"from {2 ** (last - 1)}"]
    return bands, names
