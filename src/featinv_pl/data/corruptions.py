"""Corruptions of small images, seeded per image.

Named after those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), and scaled, as its
small-image counterparts are, for images of 32 pixels. They are not the published set: results on
them are comparable with each other, not with published ImageNet-C figures.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from featinv_pl.errors import UserError

Pixels = NDArray[np.float64]
"""(H, W, 3) in [0, 1]."""


def gaussian_noise(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Noise of the sensor, drawn for each channel by itself."""
    return pixels + rng.normal(scale=(0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1], size=pixels.shape)


def gaussian_blur(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """A lens out of focus."""
    radius = (0.8, 1.2, 1.8, 2.5, 3.5)[severity - 1]
    return _from_image(_to_image(pixels).filter(ImageFilter.GaussianBlur(radius)))


def contrast(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Contrast reduced around the mean of the image."""
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return np.asarray((pixels - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1] + mean)


def pixelate(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Resolution lost to a coarse grid."""
    image = _to_image(pixels)
    scale = (0.6, 0.45, 0.35, 0.25, 0.2)[severity - 1]
    small = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))), Image.Resampling.BOX)
    return _from_image(small.resize(image.size, Image.Resampling.BOX))


def jpeg_compression(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Block artefacts."""
    buffer = io.BytesIO()
    _to_image(pixels).save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    return _from_image(Image.open(buffer))


CORRUPTIONS: dict[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    function.__name__: function for function in (gaussian_noise, gaussian_blur, contrast, pixelate, jpeg_compression)
}


def corrupt(image: NDArray[np.uint8], name: str, severity: int, seed: int) -> NDArray[np.uint8]:
    """Corrupt an image.

    Args:
        image: (H, W, 3) bytes.
        name: A name in `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Decides the noise: give each image its own.

    Returns:
        (H, W, 3) bytes.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"There is no corruption '{name}'. Choose among: {', '.join(CORRUPTIONS)}.")
    if not 1 <= severity <= 5:
        raise UserError(f"The severity of a corruption is 1 to 5, and {severity} was given.")
    corrupted = CORRUPTIONS[name](image / 255.0, severity, np.random.default_rng(seed))
    return (corrupted.clip(0, 1) * 255).round().astype(np.uint8)


def _to_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _from_image(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float64) / 255
