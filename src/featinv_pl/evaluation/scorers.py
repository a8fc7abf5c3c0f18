"""The networks that score: what each sees of originals and reconstructions, and by which metrics this is compared."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torchmetrics import Metric

from featinv_pl.errors import UserError
from featinv_pl.evaluation.arms import FLOOR, INVERSION, ORIGINAL
from featinv_pl.metrics.agreement import Agreement, AttackSuccess, ConditionalAgreement, LabelAccuracy
from featinv_pl.metrics.diversity import MapDiversity, PixelDiversity
from featinv_pl.metrics.frechet import FrechetDistance
from featinv_pl.metrics.kernel import KernelDistance
from featinv_pl.metrics.pixels import PerceptualDistance, PixelSimilarity
from featinv_pl.metrics.sample_metric import SampleMetric
from featinv_pl.metrics.similarity import MapSimilarity
from featinv_pl.metrics.weights import INCEPTION_FEATURES, Inception, Lpips, Weights
from featinv_pl.runtime.ranks import agree

Classes = Sequence[int] | None
"""Labels of the classes of a test set, where they are a part of the classifier's."""


@dataclass(frozen=True)
class Scorer:
    """A network and the metrics that compare what it sees.

    Attributes:
        prefix: Of the names of its scores.
        observe: From images to an observation; None for the backbone, whose observations travel with the batch.
        classifies: Whether it has classes.
        create: Makes new metrics for a test set: those of each image, and those of whole sets.
    """

    prefix: str
    observe: Callable[[Tensor], Mapping[str, Any]] | None
    classifies: bool
    create: Callable[[Classes], list[Metric]]

    def metrics(self, arm: str, classes: Classes) -> list[Metric]:
        """New metrics for an arm."""
        made = self.create(classes)
        if arm == FLOOR:
            # Another image of a set is an image of that set: as a distance between sets, it says nothing.
            made = [metric for metric in made if isinstance(metric, SampleMetric)]
        if arm == ORIGINAL:  # which agrees with itself, but not always with its label
            return [metric for metric in made if isinstance(metric, LabelAccuracy | AttackSuccess)]
        if arm != INVERSION:
            made = [metric for metric in made if not isinstance(metric, PixelDiversity | MapDiversity)]
        return [metric for metric in made if not isinstance(metric, AttackSuccess)]


def scorers(
    module: Any, replicates: int, diverse: bool, inception: Weights, alexnet: Weights
) -> tuple[list[Scorer], list[str]]:
    """The networks that score an inverter, and notes on what cannot be scored.

    Args:
        module: A `FeatureInversion`.
        replicates: See `SampleMetric`; 0 leaves all but the backbone out.
        diverse: Whether there are several reconstructions from each map.
        inception: See `PerSource`.
        alexnet: See `PerSource`.
    """
    backbone, judge, notes = module.inverter.classifier, module.judge, []
    channels, name = backbone.feature_shape[0], network_name(backbone)

    def own(classes: Classes) -> list[Metric]:
        return [
            MapSimilarity(replicates),
            PixelSimilarity(replicates),
            *(_classes(replicates, classes) if backbone.classifies else []),
            *([PixelDiversity(replicates), MapDiversity(replicates)] if diverse else []),
            FrechetDistance(channels, f"fd_{name}"),
            KernelDistance(channels, f"kd_{name}"),
        ]

    found = [Scorer("", None, backbone.classifies, own)]
    if not backbone.classifies:
        notes.append(f"there are no scores of classes: '{backbone.title}' has no classes, so its maps alone are scored")
    if replicates == 0:
        return found, notes
    if judge is not None:

        def judged(classes: Classes) -> list[Metric]:
            return [MapSimilarity(replicates), *([Agreement(replicates)] if judge.classifies else [])]

        found.append(Scorer("judge_", judge.classify, judge.classifies, judged))
    network = _published("fid and kid", Inception, inception, "inception", notes)
    if network is not None:
        features = network.to(module.device)
        found.append(Scorer("", lambda images: {"features": features(images)}, False, _inception_distances))
    network = _published("lpips", Lpips, alexnet, "alexnet", notes)
    if network is not None:
        distance = network.to(module.device)
        found.append(
            Scorer("", lambda images: {"images": images}, False, lambda _: [PerceptualDistance(distance, replicates)])
        )
    return found, notes


def _published(scores: str, kind: Callable[..., nn.Module], weights: Weights, option: str, notes: list[str]) -> Any:
    """A network of published weights, on all ranks or on none: some alone would wait for the others' scores."""
    try:
        return agree(lambda: kind(weights, f"PerSource.{option}"))
    except UserError as error:
        if isinstance(weights, Path):
            raise
        notes.append(f"no {scores}: {error}")
        if weights is not None:  # asked for: a long test is not the time to wait with that
            rank_zero_only(print)(f"Note: {notes[-1]}")
        return None


def _classes(replicates: int, classes: Classes) -> list[Metric]:
    return [
        Agreement(replicates),
        LabelAccuracy(replicates, classes),
        ConditionalAgreement(replicates),
        AttackSuccess(replicates),
    ]


def _inception_distances(classes: Classes) -> list[Metric]:
    return [FrechetDistance(INCEPTION_FEATURES, "fid"), KernelDistance(INCEPTION_FEATURES, "kid")]


def network_name(backbone: Any) -> str:
    """What timm calls the architecture, and the weights if they are its own, as part of a score's name."""
    config = backbone.model.pretrained_cfg
    parts = [config["architecture"], "" if Path(backbone.name).is_dir() else config.get("tag")]
    return re.sub(r"[^\w-]", "-", "-".join(part for part in parts if part))
