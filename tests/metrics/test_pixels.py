"""Similarity of images, against torchmetrics."""

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from featinv_pl.metrics.pixels import PerceptualDistance, PixelSimilarity


def images() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    target = torch.rand(5, 3, 32, 32, generator=rng) * 2 - 1
    return (target + 0.3 * torch.randn(target.shape, generator=rng)).clamp(-1, 1), target


def test_equals_torchmetrics() -> None:
    preds, target = images()
    metric = PixelSimilarity()
    metric.update(preds, target)
    scores = {name: value.item() for name, value in metric.compute().items()}
    psnr = peak_signal_noise_ratio(preds, target, data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    grey = [((side + 1) / 2 * weights).sum(1, keepdim=True) for side in (preds, target)]
    assert scores["psnr"] == pytest.approx(psnr.item(), rel=1e-5)
    ssim = structural_similarity_index_measure(grey[0], grey[1], data_range=1.0)
    assert isinstance(ssim, Tensor)
    assert scores["ssim"] == pytest.approx(ssim.item(), rel=1e-5)


def test_equal_images_have_the_highest_scores() -> None:
    metric = PixelSimilarity()
    metric.update(images()[1], images()[1])
    assert {name: round(value.item(), 4) for name, value in metric.compute().items()} == {"psnr": 100.0, "ssim": 1.0}


def test_perceptual_distance_averages_what_the_network_says() -> None:
    metric = PerceptualDistance(lambda preds, target: (preds - target).abs().amax((1, 2, 3)))
    preds, target = images()
    metric.update(preds, target)
    assert metric.compute()["lpips"].item() == pytest.approx((preds - target).abs().amax((1, 2, 3)).mean().item())
