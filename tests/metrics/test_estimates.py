"""Intervals of shares and of what is made of them, against scipy, simulated experiments and plain sums."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from featinv_pl.metrics.agreement import Agreement
from featinv_pl.metrics.estimates import Estimate, ImageSums, ratios
from featinv_pl.metrics.sample_metric import poisson_weights


@pytest.mark.parametrize(("hits", "count"), [(360, 360), (0, 7), (351, 360), (1, 3)])
def test_a_share_has_wilsons_interval(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert share(np.arange(count) < hits).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def share(hits: NDArray[Any]) -> Estimate:
    weights = poisson_weights(tuple(map(str, range(len(hits)))), 500).numpy()
    values = np.concatenate([[hits.mean()], weights.T @ hits / weights.sum(0).clip(1)])
    return Estimate.of_share(values, len(hits), len(hits))


def test_certainty_in_every_image_is_none_in_what_is_derived() -> None:
    one, other = share(np.ones(60)), share(np.ones(60))
    for derived, value in ((one - other, 0), (one / other, 1)):
        low, high = derived.interval or (np.nan, np.nan)
        assert low < value - 0.03 < value + 0.03 < high


@pytest.mark.parametrize(("operation", "width"), [(Estimate.__sub__, 0.18), (Estimate.__truediv__, 0.25)])
def test_intervals_of_paired_shares_cover(operation: Callable[[Estimate, Estimate], Estimate], width: float) -> None:
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(200):
        chances = rng.random((3, 80))
        one = (chances[0] < 0.7) | (chances[1] < 0.5)  # both are right where the first is: they are correlated
        other = (chances[0] < 0.7) | (chances[2] < 0.3)
        truth = operation(Estimate(np.array([0.85])), Estimate(np.array([0.79]))).values[0]
        low, high = operation(share(one), share(other)).interval or (np.nan, np.nan)
        covered += low <= truth <= high
        widths.append(high - low)
    assert 0.91 <= covered / 200 <= 0.99
    assert np.mean(widths) < width  # of unpaired ones it would be 0.24 and 0.32


def test_partners_that_are_shared_are_resampled() -> None:
    """Each of 300 images is compared with one of 8, some of which agree with most: 8 is what counts."""
    covered = 0
    for trial in range(50):
        rng = np.random.default_rng(trial)
        partners, likely = rng.integers(8, size=300), rng.beta(2, 2, 8)
        agreed = torch.from_numpy(rng.random(300) < likely[partners])
        keys, others = ([f"{trial} {one}" for one in side] for side in (range(300), partners))
        metric = Agreement(200)
        metric.update(torch.eye(2)[agreed.long()], torch.eye(2)[[1] * 300], keys, others)
        values = metric.compute()["agreement@1"].numpy()
        assert values[0] == pytest.approx(agreed.double().mean().item())
        low, high = Estimate.of_share(values, metric.sizes["agreement@1"], 8).interval or (np.nan, np.nan)
        covered += low <= 0.5 <= high
    assert covered >= 45  # of 50; 23 if partners were not resampled


def test_relative_scores_are_of_common_images_alone() -> None:
    clean, group = ImageSums(2), ImageSums(2)
    clean.add(["a", "b", "c", "d"], np.array([[1.0, 1], [0.5, 0], [0.9, np.nan], [0.1, 1]]))
    group.add(["b", "a"], np.array([[0.4, 1], [0.8, 0]]))
    group.add(["a", "c", "x"], np.array([[0.6, 1], [0.3, 1], [9.0, 1]]))  # a twice; x is not among the clean
    cosine, label = ratios(group, clean, [False, True], 300)
    assert cosine.values[0] == pytest.approx((0.4 + 0.8 + 0.6 + 0.3) / (0.5 + 1 + 1 + 0.9))
    assert label.values[0] == pytest.approx((1 + 0 + 1) / (0 + 1 + 1))  # c has no label
    assert (cosine.count, label.count) == (4, 3)
    weights = dict(zip("abc", poisson_weights(("a", "b", "c"), 300).numpy(), strict=True))
    above = weights["b"] * 0.4 + weights["a"] * 1.4 + weights["c"] * 0.3
    below = weights["b"] * 0.5 + weights["a"] * 2.0 + weights["c"] * 0.9
    assert np.isnan(cosine.values[1:]).sum() == (below == 0).sum()
    assert cosine.values[1:][below > 0] == pytest.approx((above / np.where(below > 0, below, 1))[below > 0])
