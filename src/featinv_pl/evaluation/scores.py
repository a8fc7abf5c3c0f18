"""The scores of all test sets, one set after the other, and of the groups that these belong to."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchmetrics import Metric

from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.errors import UserError
from featinv_pl.evaluation.baselines import Floor
from featinv_pl.evaluation.methods import FLOOR, INVERSION
from featinv_pl.evaluation.results import Name, Results, samples_file, samples_path
from featinv_pl.evaluation.scorers import Classes, Scorer
from featinv_pl.evaluation.tally import Tally
from featinv_pl.files import write_bytes
from featinv_pl.metrics.estimates import Estimate
from featinv_pl.metrics.frechet import FrechetDistance
from featinv_pl.metrics.pairing import ImageSums, ratios
from featinv_pl.metrics.sample_metric import SampleMetric
from featinv_pl.runtime.ranks import agree

RELATIVE = {"cosine": False, "agreement@1": True, "agreement@5": True, "label@1": True}
"""Scores that are compared with those of the clean test set, and whether each is a share."""


class Scores:
    """Scores test sets one after the other, on all ranks alike: closing one waits for the others.

    Args:
        results: Gets the scores and notes.
        test_sets: In the order in which they are evaluated.
        scorers: The networks that score; the first is the inverter's classifier.
        methods: Those that every test set has.
        inverter: The `Inverter`.
        clean: The test set that groups are compared with.
        root: The folder of the run, for a table of each test set's images; None to write none.
    """

    def __init__(
        self,
        results: Results,
        test_sets: Mapping[str, ShardSet],
        scorers: Sequence[Scorer],
        methods: Sequence[str],
        inverter: Any,
        clean: str,
        root: Path | None,
    ) -> None:
        self.results, self.test_sets, self.scorers, self.methods = results, test_sets, scorers, methods
        self.num_classes, self.device = inverter.classifier.num_classes, inverter.device
        self.clean, self.root = clean, root
        self.pending = list(test_sets)
        self.current: Tally | None = None
        self.groups: dict[str, Tally] = {}
        self.sums: dict[str, ImageSums] = {}
        self.reference = ImageSums(len(RELATIVE))
        self.biased: dict[str, list[str]] = {}

    def _note(self, text: str) -> None:
        self.results.notes.append(text)

    def open(self, test_set: str) -> Tally:
        """The tally of a test set; those before it are closed."""
        while self.current is None or self.current.test_set != test_set:
            self._next()
        return self.current

    def finish(self, replicates: int) -> None:
        """Close the last test sets, and add what follows from all scores."""
        while self.pending or self.current is not None:
            self._next()
        for name, sets in self.biased.items():
            others = f" and {len(sets) - 1} others" * (len(sets) > 1)
            self._note(
                f"{name} is biased upwards where there are no more samples than features, such as in {sets[0]}{others}"
            )
        self.results.derive()
        estimates, notes = relative(self.sums, self.reference, self.clean, replicates)
        self.results.values |= estimates
        self.results.notes += notes

    def _next(self) -> None:
        if self.current is not None:
            self._close(self.current)
        self.current = self._opened(self.pending.pop(0)) if self.pending else None

    def _opened(self, test_set: str) -> Tally:
        samples, floor = self.test_sets[test_set], None
        if len(samples) > 1:
            try:
                floor = agree(lambda: Floor(samples))
            except UserError as error:
                self._note(f"{test_set}: there is no floor: {error}")
        classes = self._classes(test_set, samples.manifest["settings"].get("classes", {}))
        methods = self.methods if floor is None else [*self.methods, FLOOR]
        return Tally(test_set, self.scorers, self._metrics(methods, classes), floor, classes)

    def _classes(self, test_set: str, labels: Mapping[str, int]) -> list[int] | None:
        """The classes of a test set, if they are some of the classifier's: one class alone would always be right."""
        classes = sorted({label for label in labels.values() if 0 <= label < self.num_classes})
        if not 1 < len(classes) < self.num_classes:
            return None
        self._note(
            f"{test_set}: label@1 is taken over the {len(classes)} classes of the set, as is usual for ImageNet-A and "
            f"-R, and label@1_all over all {self.num_classes} of the classifier"
        )
        return classes

    def _metrics(self, methods: Iterable[str], classes: Classes = None) -> dict[tuple[int, str], list[Metric]]:
        made = {
            (number, method): [metric.to(self.device) for metric in scorer.metrics(method, classes)]
            for method in methods
            for number, scorer in enumerate(self.scorers)
        }
        return {key: metrics for key, metrics in made.items() if metrics}

    def _close(self, tally: Tally) -> None:
        tally.gather()
        name, columns = tally.test_set, tally.columns
        if tally.left_out:
            example = tally.left_out[0]
            self._note(f"{name}: left out {len(tally.left_out)} samples with NaN or Inf, such as '{example}'")
        foreign = sum(label >= self.num_classes for label in columns.get("label", []))
        if foreign and self.scorers[0].classifies:
            self._note(
                f"{name}: {foreign} labels are not among the classifier's {self.num_classes} classes and do not count. "
                "Do they belong to another data set?"
            )
        self._score(tally)
        if tally.count and self.root is not None:
            write_bytes(samples_path(self.root, name), samples_file(columns))
        groups = groups_of(name)
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
            self._note(f"{tally.test_set}: no sample could be scored")
            return
        self.results.counts[tally.test_set] = tally.count
        for name, estimate, metric in tally.estimates():
            self.results.values[name] = estimate
            if name.method != INVERSION or isinstance(metric, SampleMetric):
                continue
            if isinstance(metric, FrechetDistance) and tally.count <= metric.num_features:
                self.biased.setdefault(name.score, []).append(tally.test_set)
            if np.isnan(estimate.values[0]):
                self._note(f"{tally.test_set}: {tally.count} samples are too few for {name.score}, which needs 2")


def groups_of(test_set: str) -> list[str]:
    """The groups that a test set belongs to: `a/b` and `a` for `a/b/c`."""
    parts = test_set.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def relative(
    groups: Mapping[str, ImageSums], reference: ImageSums, clean: str, replicates: int
) -> tuple[dict[Name, Estimate], list[str]]:
    """`<score>_relative`: the score of a group divided by that of the clean test set, over the images of both.

    Args:
        groups: Sums of `RELATIVE` by image, such as over all severities of a corruption.
        reference: Those of the clean test set.
        clean: Its name.
        replicates: See `SampleMetric`.

    Returns:
        The scores, and notes on what is missing.
    """
    if groups and not reference.rows:
        advice = "no test set of that name was scored. Name the clean one by `clean`"
        return {}, [f"there are no scores relative to '{clean}': {advice}"]
    found: dict[Name, Estimate] = {}
    notes = []
    for group, sums in groups.items():
        if missing := len(sums.rows.keys() - reference.rows.keys()):
            notes.append(
                f"{group}: {missing} of {len(sums.rows)} images are not in '{clean}' and do not count in scores "
                "relative to it"
            )
        if missing < len(sums.rows):
            quotients = ratios(sums, reference, list(RELATIVE.values()), replicates)
            names = [Name(group, f"{score}_relative") for score in RELATIVE]
            found |= dict(zip(names, quotients, strict=True))
    return found, notes
