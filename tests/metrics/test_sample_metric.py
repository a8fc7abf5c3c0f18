"""Means over samples and their bootstrap: a function of the samples and their keys alone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from featinv_pl.metrics.agreement import LabelAccuracy
from featinv_pl.metrics.sample_metric import poisson_weights
from featinv_pl.metrics.similarity import MapSimilarity

KEYS = [f"{index:04d}" for index in range(60)]


def maps() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    target = torch.rand(60, 6, 3, 4, generator=rng)
    share = torch.rand(60, 1, 1, 1, generator=rng)
    return target * share + torch.randn(target.shape, generator=rng) * (1 - share), target


def distribution(rows: list[int], size: int) -> Tensor:
    metric, (preds, target) = MapSimilarity(200), maps()
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        metric.update(preds[part], target[part], [KEYS[row] for row in part])
    return metric.compute()["cosine"]


def test_replicates_depend_neither_on_batches_nor_on_order() -> None:
    whole = distribution(list(range(60)), 60)
    assert whole.shape == (201,)
    torch.testing.assert_close(distribution(list(range(60)), 7), whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(distribution(torch.randperm(60).tolist(), 11), whole, atol=1e-12, rtol=0)


def test_replicates_add_up_over_ranks() -> None:
    preds, target = maps()
    ranks = [MapSimilarity(200), MapSimilarity(200)]
    for rank, metric in enumerate(ranks):
        metric.update(preds[rank::2], target[rank::2], KEYS[rank::2])
    ranks[0].merge_state(ranks[1])
    torch.testing.assert_close(ranks[0].compute()["cosine"], distribution(list(range(60)), 60), atol=1e-12, rtol=0)


def test_interval_is_that_of_the_mean() -> None:
    values, keys = torch.randn(2000, generator=torch.Generator().manual_seed(1)), [str(row) for row in range(2000)]
    logits = torch.stack([values, torch.zeros(2000)], dim=1)
    metric = LabelAccuracy(1000)
    for start in range(0, 2000, 100):
        part = slice(start, start + 100)
        metric.update(logits[part], torch.zeros(100, dtype=torch.long), keys[part])
    means = metric.compute()["label@1"]
    share = (values > 0).double().mean()
    assert means[0] == pytest.approx(share.item())
    assert means[1:].mean() == pytest.approx(share.item(), abs=2e-3)
    assert means[1:].std() == pytest.approx((share * (1 - share) / 2000).sqrt().item(), rel=0.1)


def test_weights_are_poisson_and_belong_to_the_key() -> None:
    weights = poisson_weights(tuple(KEYS), 1000)
    assert weights.mean() == pytest.approx(1, abs=0.02)
    assert weights.var() == pytest.approx(1, abs=0.03)
    assert torch.equal(poisson_weights(("0007",), 1000)[0], weights[7])
    correlations = np.corrcoef(weights.numpy()) - np.eye(60)
    assert abs(correlations).max() < 0.2


def test_a_value_that_is_not_finite_does_not_count() -> None:
    metric = LabelAccuracy()
    logits = torch.eye(3)[[0, 1, 2, 2]]
    metric.update(logits, torch.tensor([0, -1, 3, 0]))  # right, without a label, no class of the three, wrong
    assert metric.compute()["label@1"].item() == 0.5
