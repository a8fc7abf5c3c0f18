"""The scores of one test set while it is evaluated."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from featinv_pl.evaluation.baselines import PARTNERS, Floor
from featinv_pl.evaluation.methods import FLOOR
from featinv_pl.evaluation.reconstructions import Reconstruction
from featinv_pl.evaluation.results import Name, column
from featinv_pl.evaluation.scorers import Classes, Scorer
from featinv_pl.metrics.estimates import Estimate
from featinv_pl.metrics.sample_metric import SampleMetric
from featinv_pl.runtime.ranks import of_all_ranks
from featinv_pl.types import Batch


@dataclass
class Tally:
    """The scores so far of one test set, or of a group of them."""

    test_set: str
    scorers: Sequence[Scorer]
    metrics: dict[tuple[int, str], list[Metric]]
    """By number of the scorer and by method."""
    floor: Floor | None = None
    classes: Classes = None
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The table of images."""
    left_out: list[str] = field(default_factory=list)
    """Keys of images that cannot be scored."""
    count: int = 0
    """Images that count, on all ranks."""
    parts: int = 1
    """Test sets that it consists of."""

    def update(self, batch: Batch, made: Mapping[str, Reconstruction]) -> None:
        """Add a batch and its reconstructions by method."""
        batch, made = self._finite(batch, made)
        if not batch["key"]:
            return
        given = {"fooled": torch.full(batch["labels"].shape, torch.nan).to(batch["logits"]), **batch}
        columns: dict[str, list[Any]] = {"key": batch["key"], "label": batch["labels"].tolist()}
        for number, scorer in enumerate(self.scorers):
            target = {**given, **scorer.observe(batch["images"])} if scorer.observe else given
            for method, reconstruction in made.items():
                if not (metrics := self.metrics.get((number, method))):
                    continue
                preds = scorer.observe(reconstruction["images"]) if scorer.observe else reconstruction
                if scorer.classifies:
                    columns[column(f"{scorer.prefix}predicted", method)] = preds["logits"].argmax(1).tolist()
                for name, values in _update(metrics, preds, target, reconstruction.get("partners")):
                    if name != "label@1_all" or self.classes is not None:
                        columns[column(f"{scorer.prefix}{name}", method)] = values
        for name, values in columns.items():
            self.columns.setdefault(name, []).extend(values)

    def _finite(self, batch: Batch, made: Mapping[str, Reconstruction]) -> tuple[Batch, Mapping[str, Reconstruction]]:
        """Drop images with NaN or Inf from all methods, and remember their keys."""
        tensors = [item[key] for item in (batch, *made.values()) for key in ("features", "logits")]
        good = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in tensors]).all(0)
        if good.all():
            return batch, made
        rows = good.nonzero().flatten().tolist()
        self.left_out += [key for row, key in enumerate(batch["key"]) if row not in rows]
        chosen = {method: _rows(reconstruction, rows) for method, reconstruction in made.items()}
        return cast(Batch, _rows(batch, rows)), cast(dict[str, Reconstruction], chosen)

    def gather(self) -> None:
        """Join the tables of all ranks; metrics synchronise themselves."""
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
        """Every score and its metric. Ranks wait for each other."""
        for (number, method), metrics in self.metrics.items():
            for metric in metrics:
                with warnings.catch_warnings():  # a rank without images has updated nothing, and a group only merges
                    warnings.filterwarnings("ignore", "The ``compute`` method")
                    values = metric.compute()
                for name, value in values.items():
                    if name != "label@1_all" or self.classes is not None:  # else it equals label@1
                        full = Name(self.test_set, f"{self.scorers[number].prefix}{name}", method)
                        yield full, self._estimate(metric, name, method, value), metric

    def _estimate(self, metric: Metric, name: str, method: str, value: Tensor) -> Estimate:
        values = value.reshape(-1).double().cpu().numpy()
        if not isinstance(metric, SampleMetric):
            return Estimate(values)
        count = metric.sizes.get(name, self.count)
        if name not in metric.shares:
            return Estimate(values, count)
        units = count / max(self.parts, 1)
        return Estimate.of_share(values, count, min(units, PARTNERS) if method == FLOOR else units)


def _update(
    metrics: Sequence[Metric], preds: Mapping[str, Any], target: Mapping[str, Any], partners: list[str] | None
) -> Iterator[tuple[str, list[float]]]:
    """Add a batch to metrics, and return the scores of its images by name."""
    for metric in metrics:
        ours, theirs = cast(Any, metric).reads
        wanted = target[theirs] if isinstance(theirs, str) else tuple(target[name] for name in theirs)
        if isinstance(metric, SampleMetric):
            metric.update(preds[ours], wanted, target["key"], partners)
            if metric.listed:
                yield from zip(metric.names, metric.latest.T.tolist(), strict=True)
        else:
            metric.update(preds[ours], wanted, target["key"])


def _rows(item: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch or of a reconstruction."""
    return {
        name: [value[row] for row in rows] if isinstance(value, list) else value[rows]
        for name, value in item.items()
        if isinstance(value, list | Tensor)
    }
