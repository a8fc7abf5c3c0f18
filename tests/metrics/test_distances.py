"""The Fréchet and the kernel distance, against their definitions and torchmetrics."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from featinv_pl.metrics.distances import FrechetDistance, KernelDistance, kernel_distance

CHANNELS = 6


def maps(size: int) -> tuple[Tensor, Tensor]:
    """Two sets of correlated features with means of their own."""
    rng = torch.Generator().manual_seed(size)
    mix = torch.randn(2, CHANNELS, CHANNELS, generator=rng)
    maps = torch.randn(2, size, CHANNELS, 3, 4, generator=rng)
    preds, target = torch.einsum("sij,snjhw->snihw", mix, maps) + torch.tensor([5.0, 5.5]).view(2, 1, 1, 1, 1)
    return preds, target


def frechet(preds: Tensor, target: Tensor) -> float:
    metric = FrechetDistance(CHANNELS, "fd")
    metric.update(preds, target)
    return metric.compute()["fd"].item()


def moments(features: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pooled = features.double().mean((2, 3)).numpy()
    return pooled.mean(0), np.cov(pooled, rowvar=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_frechet_equals_the_textbook(dtype: torch.dtype) -> None:
    preds, target = (side.to(dtype) for side in maps(50))
    (mean_a, cov_a), (mean_b, cov_b) = moments(preds), moments(target)
    textbook = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert textbook > 0.1
    assert frechet(preds, target) == pytest.approx(textbook, rel=1e-6)
    assert frechet(preds, preds[torch.randperm(50)]) == pytest.approx(0, abs=1e-6)


def test_frechet_equals_torchmetrics_where_covariances_are_singular() -> None:
    preds, target = maps(4)  # fewer samples than channels
    theirs = _compute_fid(*(torch.from_numpy(array) for side in (preds, target) for array in moments(side)))
    assert frechet(preds, target) == pytest.approx(theirs.item(), rel=1e-4)  # they take roots of rounded zeros
    vectors = frechet(preds.mean((2, 3)), target.mean((2, 3)))
    assert vectors == pytest.approx(frechet(preds, target), rel=1e-6)


def test_methods_share_the_root_of_their_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    roots, eigh = [], torch.linalg.eigh

    def counted(covariance: Tensor) -> Any:
        roots.append(covariance)
        return eigh(covariance)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    (first, target), (second, other) = maps(40), maps(41)
    found = [frechet(preds, target) for preds in (first, second[:40], target.flip(0))]
    assert len(roots) == 1
    assert found[2] == pytest.approx(0, abs=1e-6) != found[0]
    assert frechet(first, other[:40]) != found[0]
    assert len(roots) == 2


def sets(size: int) -> tuple[Tensor, Tensor, list[str]]:
    preds, target = torch.randn(2, size, CHANNELS, generator=torch.Generator().manual_seed(size))
    return preds * 1.5 + 0.2, target, [f"key-{index}" for index in range(size)]


def kernel(size: int, limit: int = 1000) -> float:
    metric = KernelDistance(CHANNELS, "kd", limit)
    metric.update(*sets(size))
    assert metric.chosen.shape == (limit, 1 + 2 * CHANNELS)  # whatever the size
    return metric.compute()["kd"].item()


@pytest.mark.parametrize("size", [2, 30])
def test_kernel_equals_its_definition(size: int) -> None:
    x, y = (side.double().numpy() for side in sets(size)[:2])

    def k(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        return float((one @ other / CHANNELS + 1) ** 3)

    terms = [k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in permutations(range(size), 2)]
    assert kernel(size) == pytest.approx(np.mean(terms), rel=1e-9)
    subset, whole = kernel(300, limit=50), kernel(300)
    assert 1e-3 < abs(subset - whole) < 1


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_pairs_of_equally_distributed_samples_score_zero_on_average(share: float) -> None:
    """Whether the two of a pair are independent or alike."""
    common, *own = torch.randn(3, 2000, 20, CHANNELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = (share**0.5 * common + (1 - share) ** 0.5 * one for one in own)
    scores = torch.stack([kernel_distance(*pair) for pair in zip(x, y, strict=True)])
    error = scores.std() / len(scores) ** 0.5
    assert scores.mean().abs() < 3 * error < 0.03
