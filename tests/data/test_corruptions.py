"""Corruptions repeat, keep the format of an image, and grow with their severity."""

import numpy as np
import pytest
from numpy.typing import NDArray

from featinv_pl.data.corruptions import CORRUPTIONS, corrupt
from featinv_pl.data.digits import digit_images
from featinv_pl.errors import UserError

NAMES = list(CORRUPTIONS)


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


@pytest.mark.parametrize("name", NAMES)
def test_grows_with_severity(name: str) -> None:
    for index in range(4):
        errors = [error(digit_images()[index], name, severity, seed=index) for severity in range(1, 6)]
        assert 0 < errors[0] < errors[1] < errors[2] < errors[3] < errors[4]


@pytest.mark.parametrize("name", NAMES)
def test_is_decided_by_its_seed(name: str) -> None:
    image = digit_images()[0]
    first = corrupt(image, name, 2, seed=7)
    np.random.seed(1)
    assert np.array_equal(corrupt(image, name, 2, seed=7), first)
    assert np.array_equal(corrupt(image, name, 2, seed=8), first) == (name != "gaussian_noise")


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
        ("fog", 1, "no corruption 'fog'.*gaussian_noise.*jpeg_compression"),
        ("contrast", 0, "is 1 to 5, and 0 was given"),
        ("contrast", 6, "is 1 to 5, and 6 was given"),
    ],
)
def test_refuses_what_there_is_not(name: str, severity: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        corrupt(digit_images()[0], name, severity, seed=0)
