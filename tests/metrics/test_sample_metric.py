"""What all metrics have in common, and the bootstrap: functions of the samples and their keys only."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from featinv_pl.metrics.agreement import Agreement, AttackSuccess, ConditionalAgreement, LabelAccuracy
from featinv_pl.metrics.distances import Distance, FrechetDistance, KernelDistance
from featinv_pl.metrics.sample_metric import poisson_weights
from featinv_pl.metrics.similarity import Diversity, MapSimilarity, PixelSimilarity

KEYS = [f"{index:04d}" for index in range(60)]
PREDS, TARGET = torch.rand(2, 60, 4, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
MAPS = [side[:, 0, :, :3, :4] for side in (PREDS, TARGET)]
LOGITS = [side.flatten(1)[:, :12] for side in (PREDS, TARGET)]
LABELS = torch.arange(60) % 14 - 1  # some without a label, some of no class of the twelve
CONDITIONS = (LOGITS[1], LABELS, (LABELS % 2).double())
METRICS: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "cosine": (lambda: MapSimilarity(200), *MAPS),
    "pixels": (lambda: PixelSimilarity(200), PREDS[:, 0], TARGET[:, 0]),
    "agreement": (lambda: Agreement(200), *LOGITS),
    "labels": (lambda: LabelAccuracy(200), LOGITS[0], LABELS),
    "conditions": (lambda: ConditionalAgreement(200), LOGITS[0], CONDITIONS),
    "attack": (lambda: AttackSuccess(200), LOGITS[0], CONDITIONS[2]),
    "diversity": (lambda: Diversity(200), (PREDS, TARGET), TARGET),
    "frechet": (lambda: FrechetDistance(3, "fd"), *MAPS),
    "kernel": (lambda: KernelDistance(3, "kd"), *MAPS),
    "kernel of few": (lambda: KernelDistance(3, "kd", 20), *MAPS),
}


def updated(name: str, parts: list[Any]) -> Any:
    make, *sides = METRICS[name]
    metric = make()
    for part in parts:
        chosen = [tuple(one[part] for one in side) if isinstance(side, tuple) else side[part] for side in sides]
        metric.update(*chosen, [KEYS[row] for row in part])
    return metric


@pytest.mark.parametrize("name", METRICS)
def test_batches_order_and_ranks_do_not_matter(name: str) -> None:
    expected = updated(name, [list(range(60))]).compute()
    assert not any(value.reshape(-1)[0].isnan() for value in expected.values())
    ranks = [updated(name, [list(range(rank, 60, 2))]) for rank in range(2)]
    ranks[0].merge_state(ranks[1])
    shuffled = torch.randperm(60).split([1, 19, 40])
    for found in (ranks[0], updated(name, [part.tolist() for part in shuffled])):
        torch.testing.assert_close(found.compute(), expected, atol=1e-9, rtol=1e-9, equal_nan=True)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("name", METRICS)
def test_too_few_samples_score_nan(name: str) -> None:
    assert all(value.isnan().all() for value in updated(name, []).compute().values())
    metric = updated(name, [[1]])
    if isinstance(metric, Distance):
        assert metric.compute().popitem()[1].isnan()
    metric.reset()
    assert all(value.isnan().all() for value in metric.compute().values())


def test_interval_is_that_of_the_mean() -> None:
    values, keys = torch.randn(1000, generator=torch.Generator().manual_seed(1)), [str(row) for row in range(1000)]
    metric = LabelAccuracy(1000)
    metric.update(torch.stack([values, torch.zeros(1000)], dim=1), torch.zeros(1000, dtype=torch.long), keys)
    mean, *means = metric.compute()["label@1"].tolist()
    share = (values > 0).double().mean().item()
    assert mean == pytest.approx(share)
    assert np.mean(means) == pytest.approx(share, abs=3e-3)
    assert np.std(means) == pytest.approx((share * (1 - share) / 1000) ** 0.5, rel=0.1)


def test_weights_are_poisson_and_belong_to_the_key() -> None:
    weights = poisson_weights(tuple(KEYS), 1000)
    assert weights.mean() == pytest.approx(1, abs=0.02)
    assert weights.var() == pytest.approx(1, abs=0.03)
    assert torch.equal(poisson_weights(("0007",), 1000)[0], weights[7])
    correlations = np.corrcoef(weights.numpy()) - np.eye(60)
    assert abs(correlations).max() < 0.2
