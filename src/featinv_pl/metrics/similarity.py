"""How alike two feature maps are."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.metrics.sample_metric import SampleMetric

BINS = 4000
QUANTILE = 0.05


class MapSimilarity(SampleMetric):
    """Cosine similarity between feature maps, in the variants that the literature leaves open.

    `cosine` is the mean over locations, `cosine_median` the median over locations, `cosine_flat` that
    of the flattened maps, `cosine_pooled` that of the spatial means; each is averaged over samples.
    `cosine_q05` is the 5 % quantile over samples of the mean over locations, read off a histogram of
    4,000 bins, so that memory is constant: it is exact to 0.0005.
    """

    names = ("cosine", "cosine_median", "cosine_flat", "cosine_pooled")
    reads = ("features", "features")
    histogram: Tensor

    def __init__(self, replicates: int = 0) -> None:
        super().__init__(replicates)
        self.add_state("histogram", torch.zeros(BINS, dtype=torch.long), dist_reduce_fx="sum")

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        """Compare feature maps (B, C, h, w)."""
        preds, target = preds.double(), target.double()
        local = cosine_similarity(preds, target, dim=1).flatten(1)
        flat = cosine_similarity(preds.flatten(1), target.flatten(1))
        pooled = cosine_similarity(preds.mean((2, 3)), target.mean((2, 3)))
        return torch.stack([local.mean(1), local.quantile(0.5, dim=1), flat, pooled], dim=1)

    def update(self, preds: Tensor, target: Tensor, *names: Any) -> None:
        """Add a batch of feature maps (B, C, h, w); see `SampleMetric`."""
        super().update(preds, target, *names)
        bins = ((self.latest[:, 0] + 1) / 2 * BINS).long().clamp(0, BINS - 1)
        self.histogram += torch.bincount(bins, minlength=BINS)

    def compute(self) -> dict[str, Tensor]:
        """See `SampleMetric`; the quantile has no replicates."""
        below = self.histogram.cumsum(0) < QUANTILE * self.histogram.sum()
        quantile = (below.sum() + 0.5) / BINS * 2 - 1
        return {**super().compute(), "cosine_q05": quantile.where(self.histogram.any(), torch.nan)}
