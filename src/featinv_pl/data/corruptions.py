"""The corruptions of ImageNet-C, generated on the fly and seeded per image.

Names and severities are the published ones (Hendrycks and Dietterich, arXiv 1903.12261): 15 corruptions
and 4 more for validation, at 5 severities, with the constants of ImageNet-C for photographs and those of
CIFAR-10-C for images whose shorter side has at most 64 pixels. The images are not the published ones:
other random numbers, no JPEG between, and four corruptions that differ in how they are made. Motion blur
and snow blur along a line with a half Gaussian instead of ImageMagick's filter, frost draws its ice
instead of cutting it from photographs, and the drops of spatter have other rims. So results on them are
comparable with each other, not with figures for ImageNet-C, and must not be called mCE.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from featinv_pl.errors import UserError

Pixels = NDArray[np.float64]
"""(H, W, 3) in [0, 1]."""
Corruption = Callable[[Pixels, Any, np.random.Generator], Pixels]
"""Takes an image, the constant of a severity, and what decides its random part; may leave [0, 1]."""

SMALL = 64
LUMINANCE = np.array([0.299, 0.587, 0.114])


def gaussian_noise(pixels: Pixels, scale: float, rng: np.random.Generator) -> Pixels:
    """Noise of a sensor in low light."""
    return pixels + rng.normal(scale=scale, size=pixels.shape)


def shot_noise(pixels: Pixels, photons: float, rng: np.random.Generator) -> Pixels:
    """Noise of discrete light."""
    return rng.poisson(pixels * photons) / photons


def impulse_noise(pixels: Pixels, amount: float, rng: np.random.Generator) -> Pixels:
    """Salt and pepper: values that are lost to 0 or 1."""
    chance = rng.random(pixels.shape)
    return np.where(chance < amount / 2, 0, np.where(chance < amount, 1, pixels))


def speckle_noise(pixels: Pixels, scale: float, rng: np.random.Generator) -> Pixels:
    """Noise that grows with the signal."""
    return pixels * (1 + rng.normal(scale=scale, size=pixels.shape))


def gaussian_blur(pixels: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """A Gaussian out of focus."""
    return np.asarray(ndimage.gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest"))


def defocus_blur(pixels: Pixels, constants: tuple[float, float], rng: np.random.Generator) -> Pixels:
    """A lens out of focus: a disc, whose rim is smoothed."""
    radius, rim = constants
    reach = np.arange(-max(8, math.ceil(radius)), max(8, math.ceil(radius)) + 1)
    disc = (reach[:, None] ** 2 + reach**2 <= radius**2).astype(float)
    disc = ndimage.gaussian_filter(disc / disc.sum(), rim, radius=1 if radius <= 8 else 2)
    return np.stack([ndimage.convolve(channel, disc, mode="mirror") for channel in np.moveaxis(pixels, 2, 0)], 2)


def glass_blur(pixels: Pixels, constants: tuple[float, int, int], rng: np.random.Generator) -> Pixels:
    """Frosted glass: pixels change places with near ones, one after the other."""
    sigma, reach, rounds = constants
    height, width, _ = pixels.shape
    order = list(range(height * width))
    for _ in range(rounds):
        steps = rng.integers(-reach, reach, (height * width, 2)).tolist()
        for row in range(height - reach - 1, reach - 1, -1):
            for here in range(row * width + width - reach - 1, row * width + reach - 1, -1):
                down, right = steps[here]
                there = here + down * width + right
                order[here], order[there] = order[there], order[here]
    shuffled = gaussian_blur(pixels, sigma, rng).reshape(-1, 3)[order].reshape(pixels.shape)
    return gaussian_blur(shuffled, sigma, rng)


def motion_blur(pixels: Pixels, constants: tuple[int, float], rng: np.random.Generator) -> Pixels:
    """A camera that moves."""
    return _trail(pixels, *constants, rng.uniform(-45, 45))


def zoom_blur(pixels: Pixels, constants: tuple[float, float], rng: np.random.Generator) -> Pixels:
    """A camera that moves towards the scene."""
    factors = np.arange(1, *constants)
    return np.asarray((pixels + sum(_zoom(pixels, factor) for factor in factors)) / (len(factors) + 1))


def snow(pixels: Pixels, constants: tuple[float, ...], rng: np.random.Generator) -> Pixels:
    """Flakes that fall, and the paleness of a winter's day."""
    mean, scale, zoom, least, reach, sigma, share = constants
    flakes = _zoom(rng.normal(mean, scale, pixels.shape[:2])[..., None], zoom)
    flakes = np.where(flakes < least, 0, flakes).clip(0, 1)
    flakes = _trail(flakes, int(reach), sigma, rng.uniform(-135, -45))
    pale = np.maximum(pixels, (pixels @ LUMINANCE)[..., None] * 1.5 + 0.5)
    return np.asarray(share * pixels + (1 - share) * pale + flakes + flakes[::-1, ::-1])


def frost(pixels: Pixels, constants: tuple[float, float], rng: np.random.Generator) -> Pixels:
    """Ice crystals on the lens: bright ridges of a fractal, bluish."""
    height, width, _ = pixels.shape
    ridges = 1 - np.abs(2 * _plasma(max(height, width), 1.8, rng)[:height, :width] - 1)
    return np.asarray(constants[0] * pixels + constants[1] * ridges[..., None] ** 2 * np.array([0.85, 0.95, 1.0]))


def fog(pixels: Pixels, constants: tuple[float, float], rng: np.random.Generator) -> Pixels:
    """Patches of fog, by the diamond-square algorithm."""
    density, decay = constants
    height, width, _ = pixels.shape
    brightest = pixels.max()
    patches = _plasma(max(height, width), decay, rng)[:height, :width, None]
    return np.asarray((pixels + density * patches) * brightest / (brightest + density))


def spatter(pixels: Pixels, constants: tuple[float, ...], rng: np.random.Generator) -> Pixels:
    """Drops of water, or at high severity of mud, on the lens."""
    mean, scale, sigma, least, strength, mud = constants
    liquid = ndimage.gaussian_filter(rng.normal(mean, scale, pixels.shape[:2]), sigma, mode="nearest")
    drops = liquid > least
    if mud:
        cover = ndimage.gaussian_filter(drops.astype(float), strength, mode="nearest")[..., None]
        cover = np.where(cover < 0.8, 0, cover)
        return np.asarray(pixels * (1 - cover) + cover * np.array([63, 42, 20]) / 255)
    depth = ndimage.distance_transform_edt(drops).clip(max=20)
    shine = np.where(drops, liquid, 0) * ndimage.uniform_filter(np.exp(-depth / 2) * drops, 3)
    shine = shine[..., None] / max(shine.max(), 1e-9)
    return np.asarray(pixels + strength * shine * np.array([175, 238, 238]) / 255)


def contrast(pixels: Pixels, factor: float, rng: np.random.Generator) -> Pixels:
    """Contrast reduced around the mean of each channel."""
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return np.asarray((pixels - mean) * factor + mean)


def brightness(pixels: Pixels, shift: float, rng: np.random.Generator) -> Pixels:
    """Value raised, at the same hue and saturation."""
    value = pixels.max(axis=2, keepdims=True)
    raised = (value + shift).clip(0, 1)
    return np.asarray(np.where(value > 0, pixels * raised / np.where(value > 0, value, 1), raised))


def saturate(pixels: Pixels, constants: tuple[float, float], rng: np.random.Generator) -> Pixels:
    """Saturation changed, at the same hue and value."""
    value, least = pixels.max(axis=2, keepdims=True), pixels.min(axis=2, keepdims=True)
    spread = value - least
    saturation = spread / np.where(value > 0, value, 1)
    wanted = (saturation * constants[0] + constants[1]).clip(0, 1)
    # A grey has hue 0, which is red.
    hue = np.where(spread > 0, (value - pixels) / np.where(spread > 0, spread, 1), np.array([0.0, 1.0, 1.0]))
    return np.asarray(value * (1 - wanted * hue))


def jpeg_compression(pixels: Pixels, quality: int, rng: np.random.Generator) -> Pixels:
    """Block artefacts."""
    buffer = io.BytesIO()
    _to_image(pixels).save(buffer, "JPEG", quality=quality)
    return _from_image(Image.open(buffer))


def pixelate(pixels: Pixels, scale: float, rng: np.random.Generator) -> Pixels:
    """Resolution lost to a coarse grid."""
    image = _to_image(pixels)
    small = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))), Image.Resampling.BOX)
    return _from_image(small.resize(image.size, Image.Resampling.NEAREST))


def elastic_transform(pixels: Pixels, constants: tuple[float, float, float], rng: np.random.Generator) -> Pixels:
    """Stretched and squeezed: a random affine map, then smooth random displacements.

    The constants are shares of the shorter side: displacement, its smoothness, and that of the affine map.
    """
    side = min(pixels.shape[:2])
    strength, sigma, affine = (constant * side for constant in constants)
    centre, third = np.array(pixels.shape[:2]) // 2, side // 3
    corners = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + rng.uniform(-affine, affine, corners.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners.astype(float))
    grid = np.stack(np.meshgrid(*map(np.arange, pixels.shape[:2]), indexing="ij"), axis=-1)
    shifts = [
        ndimage.gaussian_filter(rng.uniform(-1, 1, pixels.shape[:2]), sigma, mode="reflect", truncate=3) * strength
        for _ in range(2)
    ]
    places = np.moveaxis((grid + np.stack(shifts, axis=-1)) @ back[:2] + back[2], 2, 0)
    channels = [
        ndimage.map_coordinates(channel, places, order=1, mode="mirror") for channel in np.moveaxis(pixels, 2, 0)
    ]
    return np.stack(channels, axis=2)


# For each corruption: its constants for photographs, and for small images, at severities 1 to 5.
SEVERITIES: dict[Corruption, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    gaussian_noise: ((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    shot_noise: ((60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    impulse_noise: ((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    defocus_blur: (
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    glass_blur: (
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    motion_blur: (
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    zoom_blur: (
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    snow: (
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    frost: (
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    fog: (
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    brightness: ((0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    contrast: ((0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    elastic_transform: (
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    pixelate: ((0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    jpeg_compression: ((25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    speckle_noise: ((0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2)),
    gaussian_blur: ((1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)),
    spatter: (
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    ),
    saturate: (
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    ),
}
CORRUPTIONS: dict[str, Corruption] = {function.__name__: function for function in SEVERITIES}
"""The 15 of the benchmark, then the 4 for validation."""


def corrupt(image: NDArray[np.uint8], name: str, severity: int, seed: int) -> NDArray[np.uint8]:
    """Corrupt an image.

    Args:
        image: (H, W, 3) bytes.
        name: A name in `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Decides the random part: give each image its own.

    Returns:
        (H, W, 3) bytes.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"There is no corruption '{name}'. Choose among: {', '.join(CORRUPTIONS)}.")
    if not 1 <= severity <= 5:
        raise UserError(f"The severity of a corruption is 1 to 5, and {severity} was given.")
    constant = SEVERITIES[CORRUPTIONS[name]][min(image.shape[:2]) <= SMALL][severity - 1]
    corrupted = CORRUPTIONS[name](image / 255.0, constant, np.random.default_rng(seed))
    return (corrupted.clip(0, 1) * 255).round().astype(np.uint8)


def _trail(pixels: Pixels, reach: int, sigma: float, angle: float) -> Pixels:
    """Blur along a line from each pixel, at an angle in degrees, with half a Gaussian."""
    steps = np.arange(2 * reach + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    directions = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    trail = np.zeros_like(pixels)
    for step, weight in zip(steps.tolist(), (weights / weights.sum()).tolist(), strict=True):
        rows, columns = (
            (np.arange(size) + round(step * direction)).clip(0, size - 1)
            for size, direction in zip(pixels.shape, directions, strict=False)
        )
        trail += weight * pixels[rows][:, columns]
    return trail


def _zoom(pixels: Pixels, factor: float) -> Pixels:
    """Magnify around the centre, keeping the size."""
    height, width, channels = pixels.shape
    rows, columns = (np.linspace(-0.5, 0.5, size) * (size - 1) / factor + (size - 1) / 2 for size in (height, width))
    places = np.meshgrid(rows, columns, indexing="ij")
    zoomed = [ndimage.map_coordinates(pixels[..., index], places, order=1, mode="nearest") for index in range(channels)]
    return np.stack(zoomed, axis=2)


def _plasma(size: int, decay: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A cloud in [0, 1] by the diamond-square algorithm on a torus, at least (size, size).

    Args:
        size: Is rounded up to a power of two.
        decay: How much smaller the random part is at each finer scale.
        rng: Makes the random part.
    """
    size = 2 ** math.ceil(math.log2(size))
    cloud = np.zeros((size, size))
    step, scale = size, 1.0
    while step > 1:
        half = step // 2

        noise = rng.uniform(-scale, scale, (3, size // step, size // step))
        corners = cloud[::step, ::step]
        rows = corners + np.roll(corners, -1, axis=0)
        centres = (rows + np.roll(rows, -1, axis=1)) / 4
        centres = centres + noise[0]
        cloud[half::step, half::step] = centres
        across = (centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)) / 4
        cloud[::step, half::step] = across + noise[1]
        down = (centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)) / 4
        cloud[half::step, ::step] = down + noise[2]
        step, scale = half, scale / decay
    cloud -= cloud.min()
    return np.asarray(cloud / cloud.max())


def _to_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _from_image(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float64) / 255
