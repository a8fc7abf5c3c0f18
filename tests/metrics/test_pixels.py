"""Similarity of images, against torchmetrics and the definition."""

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from featinv_pl.metrics.pixels import PerceptualDistance, PixelSimilarity


def images() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    target = torch.rand(5, 3, 32, 32, generator=rng) * 2 - 1
    return (target + 0.3 * torch.randn(target.shape, generator=rng)).clamp(-1, 1), target


def scores(preds: Tensor, target: Tensor) -> dict[str, float]:
    metric = PixelSimilarity()
    metric.update(preds, target)
    return {name: value.item() for name, value in metric.compute().items()}


def test_psnr_equals_that_of_torchmetrics() -> None:
    preds, target = images()
    expected = peak_signal_noise_ratio(preds, target, data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3))
    assert scores(preds, target)["psnr"] == pytest.approx(expected.item(), rel=1e-5)


def test_ssim_is_that_of_its_paper() -> None:
    """Wang's MATLAB code, `ssim_index.m`: filters of the valid part alone, over grey levels in [0, 255]."""
    distances = np.arange(-5, 6)
    window = np.exp(-(distances[:, None] ** 2 + distances**2) / (2 * 1.5**2))
    window /= window.sum()
    expected = []
    for pair in zip(*images(), strict=True):
        x, y = (np.tensordot([0.299, 0.587, 0.114], (side.double().numpy() + 1) * 127.5, 1) for side in pair)
        mean_x, mean_y, xx, yy, xy = (convolve2d(z, window, "valid") for z in (x, y, x * x, y * y, x * y))
        covariance, variances = xy - mean_x * mean_y, xx - mean_x**2 + yy - mean_y**2
        one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        similarity = (2 * mean_x * mean_y + one) * (2 * covariance + two)
        expected.append((similarity / ((mean_x**2 + mean_y**2 + one) * (variances + two))).mean())
    assert scores(*images())["ssim"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_equal_images_have_the_highest_scores() -> None:
    assert scores(images()[1], images()[1]) == pytest.approx({"psnr": 100, "ssim": 1})


def test_perceptual_distance_averages_what_the_network_says() -> None:
    metric = PerceptualDistance(lambda preds, target: (preds - target).abs().amax((1, 2, 3)))
    preds, target = images()
    metric.update(preds, target)
    assert metric.compute()["lpips"].item() == pytest.approx((preds - target).abs().amax((1, 2, 3)).mean().item())
