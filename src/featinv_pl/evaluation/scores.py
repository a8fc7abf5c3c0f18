"""The scores of all test sets, one set after the other, and of the groups that these belong to."""

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.errors import UserError
from featinv_pl.evaluation.baselines import PARTNERS, Floor
from featinv_pl.evaluation.reconstructions import Reconstruction
from featinv_pl.evaluation.results import FLOOR, INVERSION, ORIGINAL, Name, Results, column, write_samples
from featinv_pl.evaluation.scorers import Classes, Scored, Scorer
from featinv_pl.metrics.distances import Distance, FrechetDistance
from featinv_pl.metrics.estimates import Estimate, ImageSums, ratios
from featinv_pl.metrics.sample_metric import SampleMetric
from featinv_pl.runtime.ranks import agree, of_all_ranks
from featinv_pl.types import Batch

# Scores that are compared with those of the clean test set, and whether each is a share.
RELATIVE = {"cosine": False, "agreement@1": True, "agreement@5": True, "label@1": True}


@dataclass
class Tally:
    """The scores so far of one test set, or of a group of them."""

    test_set: str
    scorers: Sequence[Scorer]
    metrics: dict[tuple[int, str], list[Scored]]  # by number of the scorer and by method
    floor: Floor | None = None
    classes: Classes = None
    columns: dict[str, list[Any]] = field(default_factory=dict)  # the table of images
    left_out: list[str] = field(default_factory=list)  # keys of images that cannot be scored
    count: int = 0  # images that count, on all ranks
    parts: int = 1  # test sets that it consists of

    def update(self, batch: Batch, made: Mapping[str, Reconstruction]) -> None:
        """Add a batch and its reconstructions by method, except images with NaN or Inf in one of them."""
        tensors = [item[key] for item in (batch, *made.values()) for key in ("features", "logits")]
        good = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in tensors]).all(0)
        if not good.all():
            rows = good.nonzero().flatten().tolist()
            self.left_out += [key for row, key in enumerate(batch["key"]) if row not in rows]
            batch, made = _rows(batch, rows), {method: _rows(one, rows) for method, one in made.items()}
        if not batch["key"]:
            return
        given = {"fooled": torch.full(batch["labels"].shape, torch.nan).to(batch["logits"]), **batch}
        columns: dict[str, list[Any]] = {"key": batch["key"], "label": batch["labels"].tolist()}
        for number, scorer in enumerate(self.scorers):
            target: Any = {**given, **scorer.observe(batch["images"])} if scorer.observe else given
            if scorer.classifies:
                columns[column(f"{scorer.prefix}predicted", ORIGINAL)] = target["logits"].argmax(1).tolist()
            for method, reconstruction in made.items():
                if not (metrics := self.metrics.get((number, method))):
                    continue
                preds: Any = scorer.observe(reconstruction["images"]) if scorer.observe else reconstruction
                if scorer.classifies:
                    columns[column(f"{scorer.prefix}predicted", method)] = preds["logits"].argmax(1).tolist()
                for metric in metrics:
                    ours, theirs = (
                        side[names] if isinstance(names, str) else tuple(side[name] for name in names)
                        for side, names in zip((preds, target), metric.reads, strict=True)
                    )
                    metric.update(ours, theirs, batch["key"], reconstruction.get("partners"))
                    if isinstance(metric, SampleMetric) and metric.listed:
                        for name, values in zip(metric.names, metric.latest.T.tolist(), strict=True):
                            if name != "label@1_all" or self.classes is not None:
                                columns[column(f"{scorer.prefix}{name}", method)] = values
        for name, values in columns.items():
            self.columns.setdefault(name, []).extend(values)

    def gather(self) -> None:
        """Join the tables of all ranks; metrics synchronise themselves."""
        ranks = of_all_ranks((self.columns, self.left_out))
        names = dict.fromkeys(name for columns, _ in ranks for name in columns)
        self.columns = {name: [value for part, _ in ranks for value in part.get(name, [])] for name in names}
        self.left_out = sorted(key for _, keys in ranks for key in keys)
        self.count = len(self.columns.get("key", []))

    def add(self, part: "Tally") -> None:
        for key, metrics in part.metrics.items():
            for metric, other in zip(self.metrics[key], metrics, strict=True):
                metric.merge_state(other)
        self.parts += part.count > 0
        self.classes = self.classes or part.classes
        self.count += part.count

    def estimates(self) -> Iterator[tuple[Name, Estimate, Scored]]:
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

    def _estimate(self, metric: Scored, name: str, method: str, value: Tensor) -> Estimate:
        values = value.reshape(-1).double().cpu().numpy()
        if isinstance(metric, Distance):
            return Estimate(values)
        count = metric.sizes.get(name, self.count)
        if name not in metric.shares:
            return Estimate(values, count)
        units = count / max(self.parts, 1)
        return Estimate.of_share(values, count, min(units, PARTNERS) if method == FLOOR else units)


@dataclass
class Scores:
    """Scores test sets one after the other, on all ranks alike: closing one waits for the others.

    `results` get the scores and notes, the folder `root` (if any) a table of each test set's images.
    """

    results: Results
    test_sets: Mapping[str, ShardSet]  # in the order in which they are evaluated
    scorers: Sequence[Scorer]  # the first is the inverter's classifier
    methods: Sequence[str]  # those that every test set has
    inverter: Any
    clean: str  # the test set that groups are compared with
    root: Path | None

    def __post_init__(self) -> None:
        self.note, self.num_classes = self.results.notes.append, self.inverter.classifier.num_classes
        self.pending, self.reference = list(self.test_sets), ImageSums(len(RELATIVE))
        self.current: Tally | None = None
        self.groups: dict[str, Tally] = {}
        self.sums: dict[str, ImageSums] = {}

    def open(self, test_set: str) -> Tally:
        """The tally of a test set; those before it are closed."""
        while self.current is None or self.current.test_set != test_set:
            self._next()
        return self.current

    def finish(self, replicates: int) -> None:
        """Close the last test sets, and add what follows from all scores."""
        while self.pending or self.current is not None:
            self._next()
        self.results.derive()
        self._relate(replicates)

    def _next(self) -> None:
        if self.current is not None:
            self._close(self.current)
        # Metrics refer to themselves, and those of a set hold hundreds of MB, of which the collector knows nothing.
        self.current = None
        gc.collect()
        self.current = self._opened(self.pending.pop(0)) if self.pending else None

    def _opened(self, test_set: str) -> Tally:
        samples, floor = self.test_sets[test_set], None
        if len(samples) > 1:
            try:
                floor = agree(lambda: Floor(samples))
            except UserError as error:
                self.note(f"{test_set}: there is no floor: {error}")
        labels: Mapping[str, int] = samples.manifest["settings"].get("classes", {})
        known = sorted({label for label in labels.values() if 0 <= label < self.num_classes})
        classes = known if 1 < len(known) < self.num_classes else None  # one class alone would always be right
        if classes:
            self.note(
                f"{test_set}: label@1 is taken over the {len(classes)} classes of the set, as is usual for ImageNet-A "
                f"and -R, and label@1_all over all {self.num_classes} of the classifier"
            )
        methods = self.methods if floor is None else [*self.methods, FLOOR]
        return Tally(test_set, self.scorers, self._metrics(methods, classes), floor, classes)

    def _metrics(self, methods: Iterable[str], classes: Classes = None) -> dict[tuple[int, str], list[Scored]]:
        made = {
            (number, method): [metric.to(self.inverter.device) for metric in scorer.metrics(method, classes)]
            for method in methods
            for number, scorer in enumerate(self.scorers)
        }
        return {key: metrics for key, metrics in made.items() if metrics}

    def _close(self, tally: Tally) -> None:
        tally.gather()
        name, columns, left_out = tally.test_set, tally.columns, tally.left_out
        if left_out:
            self.note(f"{name}: left out {len(left_out)} samples with NaN or Inf, such as '{left_out[0]}'")
        foreign = sum(label >= self.num_classes for label in columns.get("label", []))
        if foreign and self.scorers[0].classifies:
            self.note(
                f"{name}: {foreign} labels are not among the classifier's {self.num_classes} classes and do not count. "
                "Do they belong to another data set?"
            )
        self._score(tally)
        if tally.count and self.root is not None:
            write_samples(self.root, name, columns)
        parts = name.split("/")
        groups = ["/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]  # `a/b` and `a` of `a/b/c`
        kept = [self.sums.setdefault(group, ImageSums(len(RELATIVE))) for group in groups]
        kept += [self.reference] if name == self.clean else []
        if kept and columns:
            missing = [np.nan] * tally.count
            values = np.array([columns.get(score, missing) for score in RELATIVE], dtype=np.float64).T
            for sums in kept:
                sums.add(columns["key"], values)
        for group in groups:
            if group not in self.groups:
                self.groups[group] = Tally(group, self.scorers, self._metrics([*self.methods, FLOOR]), parts=0)
            self.groups[group].add(tally)
            if not any(other.startswith(f"{group}/") for other in self.pending):
                self._score(self.groups.pop(group))

    def _score(self, tally: Tally) -> None:
        if not tally.count:
            self.note(f"{tally.test_set}: no sample could be scored")
            return
        self.results.counts[tally.test_set] = tally.count
        for name, estimate, metric in tally.estimates():
            self.results.values[name] = estimate
            if name.method == INVERSION and isinstance(metric, Distance) and "/" not in tally.test_set:
                few = f"{tally.test_set}: {tally.count} samples are too few for {name.score}"
                if tally.count < 2:
                    self.note(f"{few}, which needs 2")
                elif isinstance(metric, FrechetDistance) and tally.count <= metric.num_features:
                    self.note(f"{few}, which is biased upwards with no more samples than features")

    def _relate(self, replicates: int) -> None:
        """Add `<score>_relative`: of a group divided by that of the clean test set, over the images of both."""
        if self.sums and not self.reference.rows:
            advice = "no test set of that name was scored. Name the clean one by `clean`"
            self.note(f"there are no scores relative to '{self.clean}': {advice}")
            return
        for group, sums in self.sums.items():
            if missing := len(sums.rows.keys() - self.reference.rows.keys()):
                images = f"{missing} of {len(sums.rows)} images are not in '{self.clean}'"
                self.note(f"{group}: {images} and do not count in scores relative to it")
            if missing < len(sums.rows):
                quotients = ratios(sums, self.reference, list(RELATIVE.values()), replicates)
                names = [Name(group, f"{score}_relative") for score in RELATIVE]
                self.results.values |= dict(zip(names, quotients, strict=True))


def _rows(item: Mapping[str, Any], rows: list[int]) -> Any:
    return {
        name: [value[row] for row in rows] if isinstance(value, list) else value[rows]
        for name, value in item.items()
        if isinstance(value, list | Tensor)
    }
