"""The kernel distance of paired sets, against its definition, and its choice of samples."""

import numpy as np
import pytest
import torch
from torch import Tensor

from featinv_pl.metrics.kernel import KernelDistance, kernel_distance

CHANNELS = 6


def sets(size: int) -> tuple[Tensor, Tensor, list[str]]:
    rng = torch.Generator().manual_seed(size)
    preds, target = torch.randn(2, size, CHANNELS, generator=rng)
    return preds * 1.5 + 0.2, target, [f"key-{index}" for index in range(size)]


def score(size: int, limit: int = 1000) -> float:
    metric = KernelDistance(CHANNELS, "kd", limit)
    metric.update(*sets(size))
    return metric.compute()["kd"].item()


@pytest.mark.parametrize("size", [2, 30])
def test_equals_its_definition(size: int) -> None:
    x, y = (side.double().numpy() for side in sets(size)[:2])

    def kernel(one: np.ndarray, other: np.ndarray) -> float:
        return float((one @ other / CHANNELS + 1) ** 3)

    pairs = [(i, j) for i in range(size) for j in range(size) if i != j]
    terms = [kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i]) for i, j in pairs]
    assert score(size) == pytest.approx(np.mean(terms), rel=1e-9)


def test_pairs_of_equally_distributed_samples_score_zero_on_average() -> None:
    """Whether the two of a pair are independent or alike."""
    rng = torch.Generator().manual_seed(0)
    for share in (0.0, 0.9):
        common, *own = torch.randn(3, 2000, 20, CHANNELS, generator=rng, dtype=torch.float64)
        x, y = (share**0.5 * common + (1 - share) ** 0.5 * one for one in own)
        scores = torch.stack([kernel_distance(*pair) for pair in zip(x, y, strict=True)])
        error = scores.std() / len(scores) ** 0.5
        assert scores.mean().abs() < 3 * error
        assert error < 0.01


def test_a_subset_takes_constant_memory() -> None:
    assert score(300, limit=50) != pytest.approx(score(300), rel=1e-3)
    assert score(300, limit=50) == pytest.approx(score(300), abs=1)
    metric = KernelDistance(CHANNELS, "kd", 50)
    before = metric.chosen.shape
    metric.update(*sets(300))
    assert metric.chosen.shape == before == (50, 1 + 2 * CHANNELS)
