"""What is known of a test set while it is evaluated."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from featinv_pl.evaluation.arms import FLOOR
from featinv_pl.evaluation.references import OTHERS, Floor
from featinv_pl.evaluation.results import Name, column
from featinv_pl.evaluation.scorers import Scorer
from featinv_pl.metrics.estimates import Estimate
from featinv_pl.metrics.sample_metric import SampleMetric
from featinv_pl.runtime.ranks import of_all_ranks
from featinv_pl.types import Batch, Observation


@dataclass
class Tally:
    """What is known so far of one test set, or of a group of them.

    Attributes:
        source: Its name.
        scorers: The networks that score it.
        metrics: By number of the scorer and by arm.
        columns: The table of images.
        left_out: Keys of images that cannot be scored.
        floor: Partners for the floor; None where there are none.
        classes: Labels of its classes, where they are a part of the classifier's.
        count: Images that count, on all ranks.
        parts: Test sets that it is made of.
    """

    source: str
    scorers: Sequence[Scorer]
    metrics: dict[tuple[int, str], list[Metric]]
    floor: Floor | None = None
    classes: Sequence[int] | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    count: int = 0
    parts: int = 1

    def update(self, batch: Batch, arms: dict[str, Observation]) -> None:
        """Add a batch.

        Args:
            batch: The originals.
            arms: What each arm has of them.
        """
        arms, batch = self._finite(arms, batch)
        if not batch["key"]:
            return
        given = {"fooled": torch.full(batch["labels"].shape, torch.nan).to(batch["logits"]), **batch}
        columns: dict[str, list[Any]] = {"key": batch["key"], "label": batch["labels"].tolist()}
        for number, scorer in enumerate(self.scorers):
            target = {**given, **scorer.observe(batch["images"])} if scorer.observe else given
            for arm, observation in arms.items():
                if metrics := self.metrics.get((number, arm)):
                    preds = scorer.observe(observation["images"]) if scorer.observe else observation
                    if scorer.classifies:
                        columns[column(f"{scorer.prefix}predicted", arm)] = preds["logits"].argmax(1).tolist()
                    for name, values in _update(metrics, preds, target, observation.get("partners")):
                        if name != "label@1_all" or self.classes is not None:
                            columns[column(f"{scorer.prefix}{name}", arm)] = values
        for name, values in columns.items():
            self.columns.setdefault(name, []).extend(values)

    def _finite(self, arms: dict[str, Observation], batch: Batch) -> tuple[dict[str, Observation], Batch]:
        """Leave out images with a value that is not finite, from all arms, and remember their keys."""
        tensors = [item[key] for item in (batch, *arms.values()) for key in ("features", "logits")]
        good = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in tensors]).all(0)
        if good.all():
            return arms, batch
        rows = good.nonzero().flatten().tolist()
        self.left_out += [key for row, key in enumerate(batch["key"]) if row not in rows]
        return {arm: cast(Observation, _rows(observation, rows)) for arm, observation in arms.items()}, cast(
            Batch, _rows(batch, rows)
        )

    def gather(self) -> None:
        """Take over what other ranks have seen; metrics do so by themselves."""
        ranks = of_all_ranks((self.columns, self.left_out))
        names = dict.fromkeys(name for columns, _ in ranks for name in columns)
        self.columns = {name: [value for part, _ in ranks for value in part.get(name, [])] for name in names}
        self.left_out = sorted(key for _, keys in ranks for key in keys)
        self.count = len(self.columns.get("key", []))

    def add(self, part: "Tally") -> None:
        """Add a test set to a group."""
        for key, metrics in part.metrics.items():
            for metric, other in zip(self.metrics[key], metrics, strict=True):
                metric.merge_state(other)
        self.parts += part.count > 0
        self.classes = self.classes or part.classes
        self.count += part.count

    def estimates(self) -> Iterator[tuple[Name, Estimate, Metric]]:
        """Every score, and the metric that gave it. Ranks wait for each other."""
        for (number, arm), metrics in self.metrics.items():
            for metric in metrics:
                with warnings.catch_warnings():  # a rank without images has updated nothing, and a group only merges
                    warnings.filterwarnings("ignore", "The ``compute`` method")
                    values = metric.compute()
                for name, value in values.items():
                    if name == "label@1_all" and self.classes is None:
                        continue  # the same as label@1
                    full = Name(self.source, f"{self.scorers[number].prefix}{name}", arm)
                    yield full, self._estimate(metric, name, arm, value), metric

    def _estimate(self, metric: Metric, name: str, arm: str, value: Tensor) -> Estimate:
        values = value.reshape(-1).double().cpu().numpy()
        if not isinstance(metric, SampleMetric):
            return Estimate(values)
        count = metric.sizes.get(name, self.count)
        if name not in metric.shares:
            return Estimate(values, count)
        units = count / max(self.parts, 1)
        return Estimate.of_share(values, count, min(units, OTHERS) if arm == FLOOR else units)


def _update(
    metrics: Sequence[Metric], preds: Mapping[str, Any], target: Mapping[str, Any], partners: list[str] | None
) -> Iterator[tuple[str, list[float]]]:
    """Add a batch to metrics, and give back each image's scores by name."""
    for metric in metrics:
        ours, theirs = cast(Any, metric).reads
        wanted = target[theirs] if isinstance(theirs, str) else tuple(target[name] for name in theirs)
        if isinstance(metric, SampleMetric):
            metric.update(preds[ours], wanted, target["key"], partners)
            if metric.listed:
                yield from zip(metric.names, metric.latest.T.tolist(), strict=True)
        else:
            metric.update(preds[ours], wanted, target["key"])


def _rows(item: Any, rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch or of an observation."""
    return {
        name: [value[row] for row in rows] if isinstance(value, list) else value[rows]
        for name, value in item.items()
        if isinstance(value, list | Tensor)
    }
