"""How much reconstructions from one map differ: what the map leaves open."""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.metrics.sample_metric import SampleMetric


class PixelDiversity(SampleMetric):
    """`diversity_pixels`: root mean square difference of pixels in [0, 1], over all pairs of a map's samples."""

    names = ("diversity_pixels",)
    reads = ("sample_images", "images")

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        """Compare samples (B, n, 3, H, W) in [-1, 1] with each other; the original does not matter."""
        return _over_pairs(preds, lambda one, other: ((one - other) / 2).square().flatten(1).mean(1).sqrt())


class MapDiversity(SampleMetric):
    """`diversity_maps`: 1 - cosine of the samples' maps, mean over locations and over all pairs of a map's samples."""

    names = ("diversity_maps",)
    reads = ("sample_features", "features")

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        """Compare maps (B, n, C, h, w) of samples with each other; the original does not matter."""
        return _over_pairs(preds, lambda one, other: 1 - cosine_similarity(one, other).flatten(1).mean(1))


def _over_pairs(samples: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean distance of the pairs among samples (B, n, ...), as (B, 1)."""
    pairs = combinations(samples.double().unbind(1), 2)
    return torch.stack([distance(one, other) for one, other in pairs]).mean(0).unsqueeze(1)
