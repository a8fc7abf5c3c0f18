"""Whether a classifier predicts the same for a reconstruction as for the original."""

from collections.abc import Sequence

import torch
from torch import Tensor

from featinv_pl.metrics.sample_metric import SampleMetric


class Agreement(SampleMetric):
    """Agreement of predictions, by logits (B, K).

    `agreement@1` and `agreement@5`: the share of samples with the original's top-1 class in the reconstruction's top 1
    and top 5. `overlap@5`: the share that the two top-5 sets have in common. With fewer than five classes, five stands
    for all of them.
    """

    names = ("agreement@1", "agreement@5", "overlap@5")
    shares = ("agreement@1", "agreement@5")
    reads = ("logits", "logits")

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        theirs, ours = (logits.topk(min(5, target.shape[1])).indices for logits in (target, preds))
        same = (ours.unsqueeze(1) == theirs.unsqueeze(2)).double()  # by rank of theirs and of ours
        return torch.stack([same[:, 0, 0], same[:, 0].sum(1), same.sum(2).mean(1)], dim=1)


class LabelAccuracy(SampleMetric):
    """The share of samples whose reconstruction is classified as its label says, by logits (B, K) and labels (B,).

    `label@1` is taken over the `classes` of the test set if these are a part of the classifier's, as is published for
    ImageNet-A and -R, which have 200 of 1000; `label@1_all` over all classes of the classifier. Samples without a label
    (-1), or with a label that the classifier does not know, do not count.
    """

    names = ("label@1", "label@1_all")
    shares = names
    reads = ("logits", "labels")

    def __init__(self, replicates: int = 0, classes: Sequence[int] | None = None) -> None:
        super().__init__(replicates)
        self.classes = classes

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        classes = torch.arange(preds.shape[1]) if self.classes is None else torch.tensor(self.classes)
        among = classes.to(preds.device)[preds[:, classes].argmax(1)]
        hits = torch.stack([among, preds.argmax(1)], dim=1) == target.unsqueeze(1)
        return hits.double().where(_known(target, preds).unsqueeze(1), torch.nan)


class ConditionalAgreement(SampleMetric):
    """Agreement of predictions where the classifier is right about the original, and where it is wrong.

    `agreement@1_right` and `agreement@1_wrong`: the share of reconstructions with the original's top-1 class among
    originals that are classified as labelled, and among those that are not: is a wrong class kept? `label@1_wrong`:
    the share classified as labelled among the latter. All are taken over all classes. Samples without a label that
    the classifier knows do not count.

    `agreement@1_fooled`, `label@1_fooled` and `agreement@1_resisted` are the same of adversarial images with which
    the attack succeeded, and of those with which it did not (1 and 0; NaN for others). An attack needs no label, so
    agreement counts those without one.
    """

    names = (
        *("agreement@1_right", "agreement@1_wrong", "label@1_wrong"),
        *("agreement@1_resisted", "agreement@1_fooled", "label@1_fooled"),
    )
    shares = names
    listed = False
    reads = ("logits", ("logits", "labels", "fooled"))

    def score(self, preds: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        logits, labels, fooled = target
        known = _known(labels, logits)
        wrong = (logits.argmax(1) != labels).double().where(known, torch.nan)
        agrees, hits = ((preds.argmax(1) == wanted).double() for wanted in (logits.argmax(1), labels))
        cases = ((agrees, 0), (agrees, 1), (hits.where(known, torch.nan), 1))
        columns = [value.where(one == given, torch.nan) for one in (wrong, fooled) for value, given in cases]
        return torch.stack(columns, dim=1)


class AttackSuccess(SampleMetric):
    """`attack_success`: the share of adversarial images with which the attack succeeded."""

    names = ("attack_success",)
    shares = names
    listed = False
    reads = ("logits", "fooled")

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        return target.double().unsqueeze(1)


def _known(labels: Tensor, logits: Tensor) -> Tensor:
    return (labels >= 0) & (labels < logits.shape[1])
