"""Differences among samples of one map."""

from itertools import combinations

import numpy as np
import pytest
import torch

from featinv_pl.metrics.diversity import MapDiversity, PixelDiversity

KEYS = ["a", "b"]


def test_are_means_over_pairs() -> None:
    images, maps = torch.rand(2, 3, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 5, 2, 2)
    pixels, features = PixelDiversity(), MapDiversity()
    pixels.update(images, images[:, 0], KEYS)
    features.update(maps, maps[:, 0], KEYS)
    for row in range(2):
        x, f = images[row].numpy(), maps[row].double().numpy()
        pairs = list(combinations(range(3), 2))
        expected = np.mean([np.sqrt((((x[i] - x[j]) / 2) ** 2).mean()) for i, j in pairs])
        assert float(pixels.latest[row]) == pytest.approx(expected, rel=1e-5)
        norms = np.linalg.norm(f, axis=1)
        cosines = [((f[i] * f[j]).sum(0) / norms[i] / norms[j]).mean() for i, j in pairs]
        assert float(features.latest[row]) == pytest.approx(1 - np.mean(cosines), rel=1e-5)
