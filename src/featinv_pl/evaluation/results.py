"""The scores of one evaluation, those derived from them, and the files and table that show them."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, cast

import numpy as np
import pyarrow
from pyarrow import parquet
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.evaluation.methods import CEILING, FLOOR, INVERSION, label, ordered
from featinv_pl.evaluation.provenance import Provenance
from featinv_pl.files import read_json
from featinv_pl.metrics.estimates import Estimate

METRICS = "metrics.json"
SCORES = "scores.csv"
SAMPLES = "samples"
HEADLINES = ("cosine", "cosine_calibrated", "agreement@1", "agreement@5", "label@1", "psnr")
COMPARED = ("cosine", "agreement@1")
PREFIXES = ("", "judge_")


class Name(NamedTuple):
    """A score of a method on a test set or a group of them.

    It is a structure in memory and in `metrics.json`, and becomes text here only, for loggers and `ModelCheckpoint`:
    `<test set>/<score>` for the inverter's own sampler, `<test set>/<score>.<method>` for the others.
    """

    test_set: str
    score: str
    method: str = INVERSION

    def __str__(self) -> str:
        return f"{self.test_set}/{column(self.score, self.method)}"


def column(score: str, method: str) -> str:
    """The name of a method's score within its test set. Names of scores and methods have no dots."""
    return score if method == INVERSION else f"{score}.{method}"


class Score(TypedDict):
    """A score and, if it is a mean, its 95 % confidence interval."""

    value: float
    low: NotRequired[float]
    high: NotRequired[float]
    n: NotRequired[int]
    """Images that count, if not all of the test set."""


class Document(TypedDict):
    """The content of `metrics.json`."""

    samples: dict[str, int]
    """Images that count, by test set or group."""
    scores: dict[str, dict[str, dict[str, Score]]]
    """By test set or group, method and score."""
    notes: list[str]
    """Missing scores, and the reasons."""
    provenance: Provenance


DOCUMENT = TypeAdapter(Document)


def by_name(document: Document) -> dict[Name, Score]:
    """The scores of a document by their full names."""
    return {
        Name(test_set, score, method): found
        for test_set, methods in document["scores"].items()
        for method, scores in methods.items()
        for score, found in scores.items()
    }


@dataclass
class Results:
    """All scores of an evaluation."""

    values: dict[Name, Estimate] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Images that count, by test set or group."""
    notes: list[str] = field(default_factory=list)
    """Missing scores, and the reasons."""
    provenance: Provenance | None = None
    """Provenance of the scores; None if they are not written."""

    def derive(self) -> None:
        """Add scores that follow from others.

        `cosine_calibrated` of a method is the position of its cosine between floor and ceiling, if the ceiling is
        higher. `cosine_difference` and `agreement@1_difference` of a method are the inverter's score minus its own.
        """
        for test_set, prefix, score in product(self.counts, PREFIXES, COMPARED):
            names = {method: Name(test_set, f"{prefix}{score}", method) for method in self.methods}
            found = {method: self.values[name] for method, name in names.items() if name in self.values}
            floor, ceiling, inverter = (found.get(method) for method in (FLOOR, CEILING, INVERSION))
            for method, own in found.items():
                between = score == "cosine" and method not in (FLOOR, CEILING)
                if between and floor and ceiling and ceiling.values[0] > floor.values[0]:
                    calibrated = Name(test_set, f"{prefix}cosine_calibrated", method)
                    self.values[calibrated] = (own - floor) / (ceiling - floor)
                if inverter and method != INVERSION:
                    self.values[Name(test_set, f"{prefix}{score}_difference", method)] = inverter - own

    @property
    def methods(self) -> list[str]:
        """All methods that have scores, in the order of tables."""
        return ordered(dict.fromkeys(name.method for name in self.values))

    @property
    def scores(self) -> dict[Name, Score]:
        """All scores that are not NaN or Inf, by test set as evaluated and by method as in tables."""
        test_sets, methods = list(self.counts), self.methods
        names = sorted(self.values, key=lambda name: (test_sets.index(name.test_set), methods.index(name.method)))
        found = {name: self.values[name] for name in names if np.isfinite(self.values[name].values[0])}
        return {name: as_score(estimate, self.counts[name.test_set]) for name, estimate in found.items()}

    @property
    def document(self) -> Document:
        """The content of `metrics.json`."""
        scores: dict[str, dict[str, dict[str, Score]]] = {}
        for name, found in self.scores.items():
            scores.setdefault(name.test_set, {}).setdefault(name.method, {})[name.score] = found
        return {
            "samples": self.counts,
            "scores": scores,
            "notes": self.notes,
            "provenance": cast(Provenance, self.provenance),
        }

    def files(self) -> dict[str, bytes]:
        """`metrics.json` and `scores.csv`."""
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(["test_set", "method", "score", "value", "low", "high", "n"])
        for name, found in self.scores.items():
            interval = (found.get("low", ""), found.get("high", ""))
            size = found.get("n", self.counts[name.test_set])
            writer.writerow([name.test_set, name.method, name.score, found["value"], *interval, size])
        return {METRICS: (json.dumps(self.document, indent=2) + "\n").encode(), SCORES: rows.getvalue().encode()}

    def table(self) -> list[list[str]]:
        """Headline scores with their intervals: a head, then a row for each complete data set and method."""
        scores = self.scores
        extra = sorted({name.score for name in self.values if name.score.startswith(("fd_", "fid"))})
        columns = [name for name in (*HEADLINES, *extra) if any(key.score == name for key in self.values)]
        table = [["test set", "n", "method", *columns]]
        for test_set in (name for name in self.counts if "/" not in name):
            for method in self.methods:
                cells = [cell(scores.get(Name(test_set, score, method))) for score in columns]
                if any(cells):
                    table.append([test_set, str(self.counts[test_set]), label(method), *cells])
        return table


def as_score(estimate: Estimate, count: int) -> Score:
    """An estimate as it is written, for a test set of `count` images."""
    score: Score = {"value": float(estimate.values[0])}
    if estimate.interval is not None:
        score |= {"low": estimate.interval[0], "high": estimate.interval[1]}
    if estimate.count is not None and estimate.count != count:
        score["n"] = estimate.count
    return score


def cell(score: Score | None) -> str:
    """A score with its interval, for a table."""
    if score is None:
        return ""
    digits = 1 if abs(score["value"]) >= 10 else 3
    interval = f" [{score['low']:.{digits}f}, {score['high']:.{digits}f}]" if "low" in score and "high" in score else ""
    return f"{score['value']:.{digits}f}{interval}"


def aligned(table: list[list[str]]) -> str:
    """A table for the terminal: the first row is its head."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def read_document(path: Path, option: str) -> Document:
    """Read a `metrics.json`, which `option` has named.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    advice = "Test again with the Evaluation callback."
    contents = read_json(path, option, advice)
    try:
        return DOCUMENT.validate_python(contents)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{str(step)[:50]!r}]" for step in first["loc"])
        raise UserError(
            f"{option}: '{path}' holds no scores, or those of an earlier version ({place}: {first['msg']}). {advice}"
        ) from error


def samples_path(root: Path, test_set: str) -> Path:
    """The file for the scores of each image of a test set."""
    return root / SAMPLES / f"{test_set}.parquet"


def read_samples(root: Path, group: str, test_sets: Iterable[str]) -> Any:
    """The scores of each image of a test set or group, as a table of pyarrow.

    Args:
        root: The folder of a run.
        group: The test set or group.
        test_sets: All test sets of the run: its folder may hold tables of earlier ones.
    """
    paths = [samples_path(root, test_set) for test_set in test_sets if f"{test_set}/".startswith(f"{group}/")]
    tables = [_table(path) for path in paths if path.is_file()]
    if not tables:
        raise UserError(f"there are no scores of the samples of '{group}' in '{root / SAMPLES}'. Test again.")
    return pyarrow.concat_tables(tables, promote_options="permissive")


def _table(path: Path) -> Any:
    try:
        return parquet.read_table(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"'{path}' is damaged or holds no scores of samples ({reason}). Test again.") from error


def samples_file(columns: Mapping[str, Any]) -> bytes:
    """Columns of equal length as a Parquet file, in the order of their keys."""
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(dict(columns)).sort_by("key"), buffer)
    return buffer.getvalue()
