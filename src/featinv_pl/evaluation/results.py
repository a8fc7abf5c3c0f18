"""The scores of one evaluation: what follows from them, and the files and table that show them."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, cast

import numpy as np
import pyarrow
from pyarrow import parquet
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.evaluation.arms import CEILING, FLOOR, INVERSION, label, ordered
from featinv_pl.files import read_json
from featinv_pl.metrics.estimates import Estimate
from featinv_pl.runtime.provenance import Evaluation

METRICS = "metrics.json"
SCORES = "scores.csv"
SAMPLES = "samples"
HEADLINES = ("cosine", "cosine_calibrated", "agreement@1", "agreement@5", "label@1", "psnr")
COMPARED = ("cosine", "agreement@1")
PREFIXES = ("", "judge_")


class Name(NamedTuple):
    """Which score, of which test set or group of them, and of which arm.

    It stays a structure, in memory and in `metrics.json`, and becomes text here alone, for loggers and
    `ModelCheckpoint`: `<test set>/<score>` for the inversion itself, `<test set>/<score>.<arm>` for the others.
    """

    source: str
    score: str
    arm: str = INVERSION

    def __str__(self) -> str:
        return f"{self.source}/{column(self.score, self.arm)}"


def column(score: str, arm: str) -> str:
    """What a score of an arm is called within its test set. Neither a score's name nor an arm's has a dot."""
    return score if arm == INVERSION else f"{score}.{arm}"


class Score(TypedDict):
    """A score and, if it is a mean, its 95 % confidence interval."""

    value: float
    low: NotRequired[float]
    high: NotRequired[float]
    n: NotRequired[int]
    """How many images count, if not all of the test set."""


class Document(TypedDict):
    """The content of `metrics.json`."""

    samples: dict[str, int]
    """By test set or group, how many images count."""
    scores: dict[str, dict[str, dict[str, Score]]]
    """By test set or group, arm and score."""
    notes: list[str]
    """What is missing, and why."""
    provenance: Evaluation


DOCUMENT = TypeAdapter(Document)


def by_name(document: Document) -> dict[Name, Score]:
    """The scores of a document under their whole names."""
    return {
        Name(source, score, arm): found
        for source, arms in document["scores"].items()
        for arm, scores in arms.items()
        for score, found in scores.items()
    }


@dataclass
class Results:
    """All scores of an evaluation.

    Attributes:
        values: Scores with their uncertainty.
        counts: Images that count, by test set or group.
        notes: What users should know of these scores: what is missing, and why.
        provenance: What was scored, of scores that are written.
    """

    values: dict[Name, Estimate] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    provenance: Evaluation | None = None

    def derive(self) -> None:
        """Add scores that follow from others.

        `cosine_calibrated`, of every arm, is where its cosine lies between floor and ceiling, if these are
        in order. `cosine_difference` and `agreement@1_difference`, of every other arm, are what the inversion has
        more than it.
        """
        for source in self.counts:
            for prefix in PREFIXES:
                self._calibrate(source, f"{prefix}cosine")
                for score in COMPARED:
                    self._compare(source, f"{prefix}{score}")

    def _calibrate(self, source: str, cosine: str) -> None:
        floor, ceiling = (self.values.get(Name(source, cosine, arm)) for arm in (FLOOR, CEILING))
        if floor is None or ceiling is None or not ceiling.values[0] > floor.values[0]:
            return
        for arm in self.arms:
            own = self.values.get(Name(source, cosine, arm))
            if own is not None and arm not in (FLOOR, CEILING):
                self.values[Name(source, f"{cosine}_calibrated", arm)] = (own - floor) / (ceiling - floor)

    def _compare(self, source: str, score: str) -> None:
        own = self.values.get(Name(source, score))
        for arm in self.arms:
            other = self.values.get(Name(source, score, arm))
            if own is not None and other is not None and arm != INVERSION:
                self.values[Name(source, f"{score}_difference", arm)] = own - other

    @property
    def arms(self) -> list[str]:
        """Names of all arms that have scores, in the order of tables."""
        return ordered(dict.fromkeys(name.arm for name in self.values))

    @property
    def scores(self) -> dict[Name, Score]:
        """Every score that there is, ordered by test set as it was evaluated, and by arm as in tables."""
        sources, arms = list(self.counts), self.arms
        names = sorted(self.values, key=lambda name: (sources.index(name.source), arms.index(name.arm)))
        found = {name: self.values[name] for name in names if np.isfinite(self.values[name].values[0])}
        return {name: as_score(estimate, self.counts[name.source]) for name, estimate in found.items()}

    @property
    def document(self) -> Document:
        """What `metrics.json` holds."""
        scores: dict[str, dict[str, dict[str, Score]]] = {}
        for name, found in self.scores.items():
            scores.setdefault(name.source, {}).setdefault(name.arm, {})[name.score] = found
        return {
            "samples": self.counts,
            "scores": scores,
            "notes": self.notes,
            "provenance": cast(Evaluation, self.provenance),
        }

    def files(self) -> dict[str, bytes]:
        """`metrics.json` and `scores.csv`."""
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(["source", "arm", "score", "value", "low", "high", "n"])
        for name, found in self.scores.items():
            interval = (found.get("low", ""), found.get("high", ""))
            size = found.get("n", self.counts[name.source])
            writer.writerow([name.source, name.arm, name.score, found["value"], *interval, size])
        return {METRICS: (json.dumps(self.document, indent=2) + "\n").encode(), SCORES: rows.getvalue().encode()}

    def table(self) -> list[list[str]]:
        """Headline scores with their intervals: a head, then a row for each whole data set and arm."""
        scores = self.scores
        extra = sorted({name.score for name in self.values if name.score.startswith(("fd_", "fid"))})
        columns = [name for name in (*HEADLINES, *extra) if any(key.score == name for key in self.values)]
        table = [["source", "n", "arm", *columns]]
        for source in (name for name in self.counts if "/" not in name):
            for arm in self.arms:
                cells = [cell(scores.get(Name(source, score, arm))) for score in columns]
                if any(cells):
                    table.append([source, str(self.counts[source]), label(arm), *cells])
        return table


def as_score(estimate: Estimate, count: int) -> Score:
    """A score as it is written, of a test set of so many images."""
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
    """Read a `metrics.json`.

    Args:
        path: The file.
        option: The option that named it, for errors.
    """
    advice = "Test again with the PerSource callback."
    contents = read_json(path, option, advice)
    try:
        return DOCUMENT.validate_python(contents)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{str(step)[:50]!r}]" for step in first["loc"])
        raise UserError(
            f"{option}: '{path}' holds no scores, or those of an earlier version ({place}: {first['msg']}). {advice}"
        ) from error


def samples_path(root: Path, source: str) -> Path:
    """Where the scores of each sample of a source are written."""
    return root / SAMPLES / f"{source}.parquet"


def read_samples(root: Path, group: str, sources: Iterable[str]) -> Any:
    """The scores of each sample of a source, or of a group of sources, as a table of pyarrow.

    Args:
        root: The folder of a run.
        group: The source or group.
        sources: All sources of the run: its folder may hold samples of earlier ones.
    """
    paths = [samples_path(root, source) for source in sources if f"{source}/".startswith(f"{group}/")]
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
