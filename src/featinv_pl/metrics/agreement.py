"""Whether a classifier sees the same in a reconstruction as in the original."""

import torch
from torch import Tensor
from torchmetrics import Metric


class Agreement(Metric):
    """Agreement of predictions.

    `agreement@1` and `agreement@5`: the share of samples whose original top-1 class is in the
    reconstruction's top 1 and top 5. `overlap@5`: the share that the two top-5 sets have in common.
    With fewer than five classes, five stands for all of them.
    """

    full_state_update = False
    higher_is_better = True
    totals: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Logits of reconstructions, (B, K).
            target: Logits of originals, (B, K).
        """
        k = min(5, target.shape[1])
        theirs, ours = target.topk(k).indices, preds.topk(k).indices
        first = theirs[:, :1]
        top1 = (ours[:, :1] == first).any(1)
        top5 = (ours == first).any(1)
        overlap = (ours.unsqueeze(1) == theirs.unsqueeze(2)).any(2).double().mean(1)
        self.totals += torch.stack([top1.double(), top5.double(), overlap], dim=1).sum(0)
        self.count += len(preds)

    def compute(self) -> dict[str, Tensor]:
        """Scores by name; NaN before any sample."""
        return dict(zip(("agreement@1", "agreement@5", "overlap@5"), self.totals / self.count, strict=True))


class LabelAccuracy(Metric):
    """The share of samples whose reconstruction is classified as its label says: `label@1`.

    Samples without a label (-1) do not count.
    """

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: Logits of reconstructions, (B, K).
            target: Labels, (B,).
        """
        self.correct += ((preds.argmax(1) == target) & (target >= 0)).sum()
        self.count += (target >= 0).sum()

    def compute(self) -> dict[str, Tensor]:
        """The score by name; NaN before any labelled sample."""
        return {"label@1": self.correct.double() / self.count}
