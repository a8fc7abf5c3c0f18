"""What all metrics have in common, agreement of predictions, the bootstrap, and intervals, against numpy and scipy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from featinv_pl.metrics.agreement import Agreement, AttackSuccess, ConditionalAgreement, LabelAccuracy
from featinv_pl.metrics.distances import Distance, FrechetDistance, KernelDistance
from featinv_pl.metrics.estimates import Estimate, ImageSums, ratios
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


def test_weights_are_poisson_and_belong_to_the_key() -> None:
    weights = poisson_weights(tuple(KEYS), 1000)
    assert weights.mean() == pytest.approx(1, abs=0.02)
    assert weights.var() == pytest.approx(1, abs=0.03)
    assert torch.equal(poisson_weights(("0007",), 1000)[0], weights[7])
    correlations = np.corrcoef(weights.numpy()) - np.eye(60)
    assert abs(correlations).max() < 0.2


def score(preds: Tensor, target: Tensor) -> dict[str, float]:
    metric = Agreement()
    metric.update(preds, target)
    return {name: value.item() for name, value in metric.compute().items()}


def test_equals_plain_numpy() -> None:
    rng = torch.Generator().manual_seed(0)
    target = torch.randn(200, 12, generator=rng)
    preds = target + torch.randn(200, 12, generator=rng)
    pairs = list(zip(*(np.argsort(-side.numpy(), axis=1)[:, :5].tolist() for side in (preds, target)), strict=True))
    plain = {
        "agreement@1": float(np.mean([a[0] == b[0] for a, b in pairs])),
        "agreement@5": float(np.mean([b[0] in a for a, b in pairs])),
        "overlap@5": float(np.mean([len(set(a) & set(b)) / 5 for a, b in pairs])),
    }
    assert len(set(plain.values())) == 3
    assert score(preds, target) == pytest.approx(plain, abs=1e-6)
    assert score(target, preds)["agreement@5"] != pytest.approx(plain["agreement@5"], abs=1e-6)  # it has a direction
    few = score(preds[:, :3], target[:, :3])  # which stand for five
    assert few["agreement@1"] < few["agreement@5"] == few["overlap@5"] == 1


def test_labels_that_the_classifier_does_not_know_do_not_count() -> None:
    metric = LabelAccuracy()
    metric.update(torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, -1, 3, 0]))
    assert metric.compute()["label@1"] == pytest.approx(1 / 2)


def test_without_a_label_no_reconstruction_is_misclassified() -> None:
    metric = ConditionalAgreement()
    labels, fooled = torch.tensor([-1, 1, 7]), torch.tensor([1.0, 1, 0])
    metric.update(torch.eye(3)[[0, 1, 0]], (torch.eye(3)[[0, 2, 2]], labels, fooled))
    scores = {name: value.item() for name, value in metric.compute().items()}
    assert (scores["label@1_fooled"], scores["agreement@1_fooled"], scores["agreement@1_resisted"]) == (1, 0.5, 0)
    assert (scores["label@1_wrong"], scores["agreement@1_wrong"], metric.sizes["agreement@1_wrong"]) == (1, 0, 1)


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
