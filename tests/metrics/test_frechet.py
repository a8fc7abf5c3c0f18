"""The Fréchet distance, against its textbook formula and against torchmetrics."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from featinv_pl.errors import UserError
from featinv_pl.metrics.frechet import FrechetDistance

CHANNELS = 6


def maps(size: int) -> tuple[Tensor, Tensor]:
    """Two sets of correlated features with means of their own."""
    rng = torch.Generator().manual_seed(size)
    mix = torch.randn(2, CHANNELS, CHANNELS, generator=rng)
    maps = torch.randn(2, size, CHANNELS, 3, 4, generator=rng)
    preds, target = torch.einsum("sij,snjhw->snihw", mix, maps) + torch.tensor([5.0, 5.5]).view(2, 1, 1, 1, 1)
    return preds, target


def score(preds: Tensor, target: Tensor) -> float:
    metric = FrechetDistance(CHANNELS, "fd_tiny")
    metric.update(preds, target)
    return metric.compute()["fd_tiny"].item()


def moments(features: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    pooled = features.double().mean((2, 3)).numpy()
    return pooled.mean(0), np.cov(pooled, rowvar=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_textbook(dtype: torch.dtype) -> None:
    preds, target = (side.to(dtype) for side in maps(50))
    (mean_a, cov_a), (mean_b, cov_b) = moments(preds), moments(target)
    textbook = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert textbook > 0.1
    assert score(preds, target) == pytest.approx(textbook, rel=1e-6)


@pytest.mark.parametrize("size", [4, 50])  # fewer samples than channels make covariances singular
def test_equals_torchmetrics(size: int) -> None:
    preds, target = maps(size)
    (mean_a, cov_a), (mean_b, cov_b) = moments(preds), moments(target)
    theirs = _compute_fid(*(torch.from_numpy(array) for array in (mean_a, cov_a, mean_b, cov_b)))
    tolerance = 1e-6 if size > CHANNELS else 1e-4  # theirs takes roots of eigenvalues that are zero but for rounding
    assert score(preds, target) == pytest.approx(theirs.item(), rel=tolerance)


@pytest.mark.parametrize("size", [3, 50])
def test_identical_sets_have_none(size: int) -> None:
    preds, _ = maps(size)
    assert score(preds, preds[torch.randperm(size)]) == pytest.approx(0, abs=1e-6)


def test_vectors_are_taken_as_they_are() -> None:
    preds, target = maps(20)
    assert score(preds.mean((2, 3)), target.mean((2, 3))) == pytest.approx(score(preds, target), rel=1e-6)


def test_refuses_maps_of_another_width() -> None:
    metric = FrechetDistance(CHANNELS + 1, "fd_tiny")
    with pytest.raises(UserError, match=f"`num_features` is {CHANNELS + 1}, and there are {CHANNELS}"):
        metric.update(*maps(3))
