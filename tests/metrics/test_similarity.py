"""Cosines between feature maps, against plain numpy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from featinv_pl.metrics.similarity import MapSimilarity

Array = NDArray[np.float64]


def maps(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Maps of reconstructions that resemble their originals more or less."""
    rng = torch.Generator().manual_seed(seed)
    target = torch.rand(size, 6, 3, 4, generator=rng)
    share = torch.rand(size, 1, 1, 1, generator=rng)
    return target * share + torch.randn(target.shape, generator=rng) * (1 - share), target


def score(preds: Tensor, target: Tensor) -> dict[str, float]:
    metric = MapSimilarity()
    metric.update(preds, target)
    return {name: value.item() for name, value in metric.compute().items()}


def cosine(a: Array, b: Array, axis: int) -> Array:
    product: Array = (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return product


def expected(preds: Tensor, target: Tensor) -> dict[str, float]:
    a, b = (side.double().numpy().reshape(len(preds), 6, -1) for side in (preds, target))
    local = cosine(a, b, 1)
    return {
        "cosine": local.mean(),
        "cosine_median": np.median(local, axis=1).mean(),
        "cosine_flat": cosine(a.reshape(len(a), -1), b.reshape(len(b), -1), 1).mean(),
        "cosine_pooled": cosine(a.mean(2), b.mean(2), 1).mean(),
        "cosine_q05": np.quantile(local.mean(1), 0.05, method="inverted_cdf"),
    }


@pytest.mark.parametrize("size", [1, 19, 20, 21, 300])
def test_equals_plain_numpy(size: int) -> None:
    preds, target = maps(size)
    scores, plain = score(preds, target), expected(preds, target)
    assert scores.keys() == plain.keys()
    assert scores.pop("cosine_q05") == pytest.approx(plain.pop("cosine_q05"), abs=0.001)
    assert scores == pytest.approx(plain, abs=1e-6)
    assert len({round(value, 3) for value in plain.values()}) == 4  # else they could stand for each other


@pytest.mark.parametrize(("sign", "quantile"), [(1, 0.99975), (-1, -0.99975)])
def test_ends_of_the_scale(sign: int, quantile: float) -> None:
    _, target = maps(5)
    scores = score(sign * 3 * target, target)
    assert scores.pop("cosine_q05") == pytest.approx(quantile)
    assert scores == pytest.approx(dict.fromkeys(scores, sign))


def test_half_precision_is_no_excuse() -> None:
    preds, target = (200 * side.half() for side in maps(20))
    scores, plain = score(preds, target), expected(preds, target)
    assert [scores[name] for name in plain][:4] == pytest.approx(list(plain.values())[:4], abs=1e-6)
