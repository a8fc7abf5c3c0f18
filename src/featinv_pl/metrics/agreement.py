"""Whether a classifier sees the same in a reconstruction as in the original."""

import torch
from torch import Tensor

from featinv_pl.metrics.sample_metric import SampleMetric


class Agreement(SampleMetric):
    """Agreement of predictions.

    `agreement@1` and `agreement@5`: the share of samples whose original top-1 class is in the
    reconstruction's top 1 and top 5. `overlap@5`: the share that the two top-5 sets have in common.
    With fewer than five classes, five stands for all of them.

    Args:
        replicates: See `SampleMetric`.
    """

    higher_is_better = True
    names = ("agreement@1", "agreement@5", "overlap@5")
    reads = ("logits", "logits")

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        """Compare logits (B, K)."""
        k = min(5, target.shape[1])
        theirs, ours = target.topk(k).indices, preds.topk(k).indices
        first = theirs[:, :1]
        top1 = (ours[:, :1] == first).any(1)
        top5 = (ours == first).any(1)
        overlap = (ours.unsqueeze(1) == theirs.unsqueeze(2)).any(2).double().mean(1)
        return torch.stack([top1.double(), top5.double(), overlap], dim=1)


class LabelAccuracy(SampleMetric):
    """The share of samples whose reconstruction is classified as its label says: `label@1`.

    Samples without a label (-1), or whose label is no class of the classifier, do not count.

    Args:
        replicates: See `SampleMetric`.
    """

    higher_is_better = True
    names = ("label@1",)
    reads = ("logits", "labels")

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        """Compare logits (B, K) with labels (B,)."""
        known = (target >= 0) & (target < preds.shape[1])
        return (preds.argmax(1) == target).double().where(known, torch.nan).unsqueeze(1)
