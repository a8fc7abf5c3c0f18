"""Agreement of predictions, against plain numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from featinv_pl.metrics.agreement import Agreement, ConditionalAgreement, LabelAccuracy


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
