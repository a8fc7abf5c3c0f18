"""How alike two feature maps are."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics import Metric

BINS = 4000
QUANTILE = 0.05


class MapSimilarity(Metric):
    """Cosine similarity between feature maps, in the variants that the literature leaves open.

    `cosine` is the mean over locations, `cosine_median` the median over locations, `cosine_flat` that
    of the flattened maps, `cosine_pooled` that of the spatial means; each is averaged over samples.
    `cosine_q05` is the 5 % quantile over samples of the mean over locations, read off a histogram of
    4,000 bins, so that memory is constant: it is exact to 0.0005.
    """

    full_state_update = False
    higher_is_better = True
    totals: Tensor
    histogram: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(BINS, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Feature maps of reconstructions, (B, C, h, w).
            target: Feature maps of originals, (B, C, h, w).
        """
        preds, target = preds.double(), target.double()
        local = cosine_similarity(preds, target, dim=1).flatten(1)
        mean = local.mean(1)
        flat = cosine_similarity(preds.flatten(1), target.flatten(1))
        pooled = cosine_similarity(preds.mean((2, 3)), target.mean((2, 3)))
        self.totals += torch.stack([mean, local.quantile(0.5, dim=1), flat, pooled], dim=1).sum(0)
        bins = ((mean + 1) / 2 * BINS).long().clamp(0, BINS - 1)
        self.histogram += torch.bincount(bins, minlength=BINS)
        self.count += len(mean)

    def compute(self) -> dict[str, Tensor]:
        """Scores by name; NaN before any sample."""
        names = ("cosine", "cosine_median", "cosine_flat", "cosine_pooled")
        scores = dict(zip(names, self.totals / self.count, strict=True))
        return {**scores, "cosine_q05": self._quantile()}

    def _quantile(self) -> Tensor:
        if self.count == 0:
            return self.totals.new_tensor(torch.nan)
        below = self.histogram.cumsum(0) < QUANTILE * self.count
        return (below.sum() + 0.5) / BINS * 2 - 1
