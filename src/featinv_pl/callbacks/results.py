"""The scores of one evaluation: what follows from them, and the files and table that show them."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.reading import read_json

METRICS = "metrics.json"
SCORES = "scores.csv"
SAMPLES = "samples"
HEADLINES = ("cosine", "cosine_calibrated", "agreement@1", "agreement@5", "label@1", "psnr")
ARMS = {
    "": "inversion",
    "_ceiling": "autoencoder",
    "_neighbour": "neighbour",
    "_floor": "floor",
    "_original": "original",
}
RELATIVE = ("cosine", "agreement@1", "agreement@5", "label@1")

Values = NDArray[np.float64]
"""(1,) or (1 + replicates,): a score, and what it is in each replicate of the bootstrap."""


class Name(NamedTuple):
    """Which score of what: written `<source>/<score><arm>`."""

    source: str
    score: str
    arm: str = ""

    def __str__(self) -> str:
        return f"{self.source}/{self.score}{self.arm}"


class Document(TypedDict):
    """The content of `metrics.json`."""

    samples: dict[str, int]
    """By source, how many count."""
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95 % confidence intervals of those scores that are means."""
    notes: list[str]
    """What is missing, and why."""


DOCUMENT = TypeAdapter(Document)


@dataclass
class Results:
    """All scores of an evaluation.

    Attributes:
        values: Scores with their replicates.
        counts: Samples that count, by source.
        notes: What users should know of these scores: what is missing, and why.
    """

    values: dict[Name, Values] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def derive(self, clean: str) -> None:
        """Add scores that follow from others, replicate by replicate, so that they have intervals too.

        `cosine_calibrated`, of every arm, is where its cosine lies between floor and ceiling, if these are
        in order.
        `<score>_relative`, of a group of sources such as a corruption at all its severities, is its ratio
        to that of `clean`.
        """
        for source in self.counts:
            for prefix in ("", "judge_"):
                cosine = f"{prefix}cosine"
                floor, ceiling = (self.values.get(Name(source, cosine, arm)) for arm in ("_floor", "_ceiling"))
                if floor is None or ceiling is None or ceiling[0] <= floor[0]:
                    continue
                for arm in self.arms.keys() - {"_floor", "_ceiling"}:
                    own = self.values.get(Name(source, cosine, arm))
                    if own is not None:
                        self.values[Name(source, f"{cosine}_calibrated", arm)] = _ratio(own - floor, ceiling - floor)
            if any(other.startswith(f"{source}/") for other in self.counts):
                for score in RELATIVE:
                    own, reference = self.values.get(Name(source, score)), self.values.get(Name(clean, score))
                    if own is not None and reference is not None:
                        self.values[Name(source, f"{score}_relative")] = _ratio(own, reference)

    @property
    def arms(self) -> dict[str, str]:
        """The names of all arms by their suffix: those that there always are, and those of further samplers."""
        return {**ARMS, **{name.arm: name.arm.removeprefix("_") for name in self.values if name.arm not in ARMS}}

    @property
    def scores(self) -> dict[str, float]:
        """Every score that there is, by its written name."""
        return {str(name): float(values[0]) for name, values in sorted(self.values.items()) if np.isfinite(values[0])}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % confidence intervals, as percentiles of the bootstrap, by the name of the score."""
        intervals = {}
        for name, values in sorted(self.values.items()):
            if len(values) > 1 and np.isfinite(values[0]):
                # A replicate of few samples can lack all that count, or the difference that a ratio divides by.
                low, high = np.percentile(values[np.isfinite(values)], [2.5, 97.5])
                intervals[str(name)] = (float(low), float(high))
        return intervals

    @property
    def document(self) -> "Document":
        """What `metrics.json` holds."""
        return {
            "samples": self.counts,
            "scores": self.scores,
            "intervals": self.intervals,
            "notes": self.notes,
        }

    def files(self) -> dict[str, bytes]:
        """`metrics.json` and `scores.csv`."""
        document = self.document
        scores, intervals = document["scores"], document["intervals"]
        rows = io.StringIO()
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(["source", "score", "arm", "value", "low", "high", "samples"])
        for name in sorted(self.values):
            if str(name) in scores:
                low, high = intervals.get(str(name), ("", ""))
                arm = self.arms[name.arm]
                writer.writerow([name.source, name.score, arm, scores[str(name)], low, high, self.counts[name.source]])
        return {METRICS: (json.dumps(document, indent=2) + "\n").encode(), SCORES: rows.getvalue().encode()}

    def table(self) -> list[list[str]]:
        """Headline scores with their intervals: a head, then a row for each whole data set and arm."""
        scores, intervals = self.scores, self.intervals
        extra = sorted({name.score for name in self.values if name.score.startswith(("fd_", "fid"))})
        columns = [name for name in (*HEADLINES, *extra) if any(key.score == name for key in self.values)]
        table = [["source", "n", "arm", *columns]]
        for source in (name for name in self.counts if "/" not in name):
            for suffix, arm in self.arms.items():
                names = [str(Name(source, column, suffix)) for column in columns]
                if any(name in scores for name in names):
                    cells = [cell(scores.get(name), intervals.get(name)) for name in names]
                    table.append([source, str(self.counts[source]), arm, *cells])
        return table


def _ratio(numerator: Values, denominator: Values) -> Values:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator / denominator)


def cell(score: float | None, interval: tuple[float, float] | None) -> str:
    """A score with its interval, for a table."""
    if score is None:
        return ""
    digits = 1 if abs(score) >= 10 else 3
    if interval is None:
        return f"{score:.{digits}f}"
    return f"{score:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


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
        raise UserError(
            f"{option}: '{path}' holds no scores ({' '.join(str(error).split())[:300]}). {advice}"
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
