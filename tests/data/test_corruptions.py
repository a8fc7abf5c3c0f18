"""Corruptions repeat, keep the format of an image, and grow with their severity."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from featinv_pl.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    brightness,
    corrupt,
    defocus_blur,
    gaussian_blur,
    glass_blur,
    motion_blur,
    saturate,
)
from featinv_pl.data.digits import digit_images
from featinv_pl.errors import UserError

NAMES = list(CORRUPTIONS)
CERTAIN = (
    *("defocus_blur", "gaussian_blur", "zoom_blur", "brightness", "contrast", "saturate", "pixelate"),
    "jpeg_compression",
)


def error(image: NDArray[np.uint8], name: str, severity: int, seed: int) -> float:
    return float(np.square(corrupt(image, name, severity, seed).astype(float) - image).mean())


@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_format_and_the_original(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    kept = image.copy()
    corrupted = corrupt(image, name, 3, seed=1)
    assert corrupted.shape == image.shape
    assert corrupted.dtype == np.uint8
    assert np.array_equal(image, kept)


def test_names_are_the_published_ones() -> None:
    assert len(NAMES) == 15 + 4
    for name in ("gaussian_noise", "glass_blur", "frost", "elastic_transform", "jpeg_compression", "saturate"):
        assert name in NAMES
    assert all(len(constants) == 5 for pair in SEVERITIES.values() for constants in pair)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (72, 100)])
def test_changes_an_image_at_every_severity(name: str, size: tuple[int, int]) -> None:
    image = np.asarray(Image.fromarray(digit_images()[5]).resize(size[::-1])) // 2 + 40
    image[..., 0] //= 2  # a colour, which saturation can change
    for severity in range(1, 6):
        corrupted = corrupt(image, name, severity, seed=0)
        assert corrupted.shape == (*size, 3)
        # CIFAR-10-C's smallest blurs reach no farther than a pixel.
        assert not np.array_equal(corrupted, image) or (name == "defocus_blur" and severity < 4)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "fog", "contrast", "gaussian_blur"])
def test_grows_with_severity(name: str) -> None:
    for index in range(4):
        errors = [error(digit_images()[index], name, severity, seed=index) for severity in range(1, 6)]
        assert 0 < errors[0] < errors[1] < errors[2] < errors[3] < errors[4]


def test_constants_follow_the_size_of_the_image() -> None:
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    small, large = (
        error(np.pad(grey, ((0, more), (0, more), (0, 0)), "edge"), "gaussian_noise", 3, 0) for more in (0, 1)
    )
    assert small**0.5 / 255 == pytest.approx(0.08, rel=0.05)
    assert large**0.5 / 255 == pytest.approx(0.18, rel=0.05)


def test_formulas_by_hand() -> None:
    pixels = np.array([[[0.2, 0.4, 0.6], [0.0, 0.0, 0.0]]])
    rng = np.random.default_rng(0)
    # At value 0.8 instead of 0.6, hue and saturation kept; black becomes grey.
    expected = np.array([0.2 * 0.8 / 0.6, 0.4 * 0.8 / 0.6, 0.8, 0.2, 0.2, 0.2]).reshape(2, 3)
    np.testing.assert_allclose(brightness(pixels, 0.2, rng)[0], expected)
    # Saturation 2/3, halved: the least channel moves from a third of the value to two thirds.
    np.testing.assert_allclose(saturate(pixels, (0.5, 0), rng)[0], np.array([[0.4, 0.5, 0.6], [0, 0, 0]]))
    point = np.zeros((31, 31, 3))
    point[15, 15] = 1
    for blurred in (defocus_blur(point, (3, 0.1), rng), motion_blur(point, (10, 3), rng), gaussian_blur(point, 1, rng)):
        assert blurred.sum() == pytest.approx(3)
    disc = defocus_blur(point, (3, 0.1), rng)[..., 0]
    assert (disc > 1e-6).sum() == 29  # points of the grid within 3 of the centre
    shuffled = glass_blur(np.random.default_rng(1).random((20, 20, 3)), (0.0, 2, 1), rng)
    assert shuffled.sum() == pytest.approx(np.random.default_rng(1).random((20, 20, 3)).sum())


@pytest.mark.parametrize("name", NAMES)
def test_is_decided_by_its_seed(name: str) -> None:
    image = digit_images()[0]
    first = corrupt(image, name, 2, seed=7)
    np.random.seed(1)
    assert np.array_equal(corrupt(image, name, 2, seed=7), first)
    assert np.array_equal(corrupt(image, name, 2, seed=8), first) == (name in CERTAIN)


def test_noise_has_the_strength_of_its_severity() -> None:
    grey = np.full((200, 200, 3), 128, dtype=np.uint8)
    noise = corrupt(grey, "gaussian_noise", 1, seed=0) / 255 - grey / 255
    assert noise.std() == pytest.approx(0.08, rel=0.02)
    assert noise.mean() == pytest.approx(0, abs=0.002)


def test_contrast_keeps_the_mean_and_scales_about_it() -> None:
    image = np.array([[40, 100], [160, 220]], dtype=np.uint8)[..., None] // np.array([1, 2, 4], dtype=np.uint8)
    mean = np.array([130, 65, 32.5])  # of each channel, so that colours stay
    expected = (image - mean) * 0.5 + mean
    assert np.abs(corrupt(image, "contrast", 2, seed=0) - expected).max() <= 0.5


def test_values_saturate_and_never_wrap() -> None:
    white = np.full((16, 16, 3), 255, dtype=np.uint8)
    noisy = corrupt(white, "gaussian_noise", 1, seed=0)
    assert (noisy == 255).mean() > 0.4
    assert noisy.min() > 128


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("sepia", 1, "no corruption 'sepia'.*gaussian_noise.*jpeg_compression"),
        ("contrast", 0, "is 1 to 5, and 0 was given"),
        ("contrast", 6, "is 1 to 5, and 6 was given"),
    ],
)
def test_refuses_what_there_is_not(name: str, severity: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        corrupt(digit_images()[0], name, severity, seed=0)
