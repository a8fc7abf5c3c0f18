"""Similarity of maps and images and differences among samples, against plain numpy, torchmetrics and the papers."""

from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.signal import convolve2d
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from featinv_pl.metrics.sample_metric import SampleMetric
from featinv_pl.metrics.similarity import Diversity, MapSimilarity, PixelSimilarity

Array = NDArray[np.float64]


def scores(metric: SampleMetric, preds: Tensor, target: Tensor) -> dict[str, float]:
    metric.update(preds, target)
    return {name: value.item() for name, value in metric.compute().items()}


def maps(size: int) -> tuple[Tensor, Tensor]:
    """Maps of reconstructions that resemble their originals more or less."""
    rng = torch.Generator().manual_seed(0)
    target = torch.rand(size, 6, 3, 4, generator=rng)
    share = torch.rand(size, 1, 1, 1, generator=rng)
    return target * share + torch.randn(target.shape, generator=rng) * (1 - share), target


def images() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    target = torch.rand(5, 3, 32, 32, generator=rng) * 2 - 1
    return (target + 0.3 * torch.randn(target.shape, generator=rng)).clamp(-1, 1), target


def cosine(a: Array, b: Array, axis: int) -> Array:
    product: Array = (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return product


@pytest.mark.parametrize(("size", "half"), [(1, False), (20, True), (21, False)])
def test_cosines_equal_plain_numpy(size: int, half: bool) -> None:
    preds, target = (200 * side.half() if half else side for side in maps(size))
    a, b = (side.double().numpy().reshape(size, 6, -1) for side in (preds, target))
    local = cosine(a, b, 1)
    plain = {
        "cosine": local.mean(),
        "cosine_median": np.median(local, axis=1).mean(),
        "cosine_flat": cosine(a.reshape(size, -1), b.reshape(size, -1), 1).mean(),
        "cosine_pooled": cosine(a.mean(2), b.mean(2), 1).mean(),
    }
    assert len({round(value, 3) for value in plain.values()}) == 4  # else they could stand for each other
    found = scores(MapSimilarity(), preds, target)
    quantile = np.quantile(local.mean(1), 0.05, method="inverted_cdf")
    assert found.pop("cosine_q05") == pytest.approx(quantile, abs=0.001)
    assert found == pytest.approx(plain, abs=1e-6)
    opposite = scores(MapSimilarity(), -3 * target, target)
    assert opposite.pop("cosine_q05") == pytest.approx(-0.99975)
    assert opposite == pytest.approx(dict.fromkeys(opposite, -1))


def test_psnr_equals_that_of_torchmetrics() -> None:
    preds, target = images()
    expected = peak_signal_noise_ratio(preds, target, data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3))
    assert scores(PixelSimilarity(), preds, target)["psnr"] == pytest.approx(expected.item(), rel=1e-5)
    assert scores(PixelSimilarity(), target, target) == pytest.approx({"psnr": 100, "ssim": 1})


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
    assert scores(PixelSimilarity(), *images())["ssim"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_diversities_are_means_over_pairs() -> None:
    images, maps = torch.rand(2, 3, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 5, 2, 2)
    metric, pairs = Diversity(), list(combinations(range(3), 2))
    metric.update((images, maps), images[:, 0])
    for row in range(2):
        x, f = images[row].numpy(), maps[row].double().numpy()
        pixels = np.mean([np.sqrt((((x[i] - x[j]) / 2) ** 2).mean()) for i, j in pairs])
        cosines = np.mean([cosine(f[i], f[j], 0).mean() for i, j in pairs])
        assert metric.latest[row].tolist() == pytest.approx([pixels, 1 - cosines], rel=1e-5)
