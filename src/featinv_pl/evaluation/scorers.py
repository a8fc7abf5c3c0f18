"""The networks that score reconstructions, and the metrics that compare what they make of originals and of these."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from featinv_pl.errors import UserError
from featinv_pl.evaluation.results import FLOOR, INVERSION, ORIGINAL
from featinv_pl.metrics.agreement import Agreement, AttackSuccess, ConditionalAgreement, LabelAccuracy
from featinv_pl.metrics.distances import Distance, FrechetDistance, KernelDistance
from featinv_pl.metrics.sample_metric import SampleMetric
from featinv_pl.metrics.similarity import Diversity, MapSimilarity, PerceptualDistance, PixelSimilarity
from featinv_pl.metrics.weights import INCEPTION_FEATURES, Inception, Lpips, Weights
from featinv_pl.nets.backbone import Backbone
from featinv_pl.runtime.ranks import agree

Scored = SampleMetric | Distance
Classes = Sequence[int] | None  # labels of the classes of a test set, where they are a part of the classifier's


@dataclass(frozen=True)
class Scorer:
    """A network and the metrics that compare its outputs."""

    prefix: str  # of the names of its scores
    create: Callable[[Classes], list[Scored]]  # makes new metrics for a test set
    observe: Callable[[Tensor], Mapping[str, Any]] | None = None  # None where the images are classified already
    classifies: bool = False

    def metrics(self, method: str, classes: Classes) -> list[Scored]:
        made = self.create(classes)
        if method == ORIGINAL:  # it agrees with itself, but not always with its label
            return [metric for metric in made if isinstance(metric, LabelAccuracy | AttackSuccess)]
        left_out: tuple[type[Scored], ...] = (AttackSuccess,)
        left_out += (Diversity,) if method != INVERSION else ()
        left_out += (Distance,) if method == FLOOR else ()  # its images are of the set: they have no distance from it
        return [metric for metric in made if not isinstance(metric, left_out)]


def classifier_scorer(classifier: Backbone, replicates: int, diverse: bool) -> Scorer:
    """The inverter's classifier, which compares several samples of each feature map too if the test is `diverse`."""
    channels, name = classifier.feature_shape[0], classifier.network.score_name

    def create(classes: Classes) -> list[Scored]:
        made: list[Scored] = [MapSimilarity(replicates), PixelSimilarity(replicates)]
        if classifier.classifies:
            made += [Agreement(replicates), LabelAccuracy(replicates, classes)]
            made += [ConditionalAgreement(replicates), AttackSuccess(replicates)]
        if diverse:
            made += [Diversity(replicates)]
        return [*made, FrechetDistance(channels, f"fd_{name}"), KernelDistance(channels, f"kd_{name}")]

    return Scorer("", create, classifies=classifier.classifies)


def judge_scorer(judge: Backbone, replicates: int) -> Scorer:
    """The held-out classifier."""

    def create(classes: Classes) -> list[Scored]:
        return [MapSimilarity(replicates), *([Agreement(replicates)] if judge.classifies else [])]

    return Scorer("judge_", create, judge.classify, judge.classifies)


def published_scorers(
    inception: Weights, alexnet: Weights, replicates: int, device: Any, note: Callable[[str], None]
) -> list[Scorer]:
    """The networks whose published weights define `fid`, `kid` and `lpips`; `note` is told why one is missing."""

    def distances(_: Classes) -> list[Scored]:
        return [FrechetDistance(INCEPTION_FEATURES, "fid"), KernelDistance(INCEPTION_FEATURES, "kid")]

    found = []
    if (features := _published("fid and kid", Inception, inception, "inception", note)) is not None:
        features.to(device)
        found.append(Scorer("", distances, lambda images: {"features": features(images)}))
    if (distance := _published("lpips", Lpips, alexnet, "alexnet", note)) is not None:
        metric = partial(PerceptualDistance, distance.to(device), replicates)
        found.append(Scorer("", lambda _: [metric()], lambda images: {"images": images}))
    return found


def _published(
    scores: str, kind: Callable[..., nn.Module], weights: Weights, option: str, note: Callable[[str], None]
) -> nn.Module | None:
    """A network of published weights, on all ranks or on none: some alone would wait for the others' scores."""
    try:
        return agree(lambda: kind(weights, f"`{option}`"))
    except UserError as error:
        if isinstance(weights, Path):
            raise
        note(f"no {scores}: {error}")
        if weights is not None:  # requested, so say so before a long test and not only after it
            rank_zero_only(logging.getLogger("featinv_pl").warning)("Note: no %s: %s", scores, error)
        return None
