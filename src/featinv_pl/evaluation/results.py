"""The scores of one evaluation, those derived from them, and the files and table that show them."""

import csv
import io
import json
import re
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
from featinv_pl.files import read_json, write_bytes
from featinv_pl.metrics.estimates import Estimate

INVERSION, CEILING, REGRESSION, RIDGE = "inversion", "ceiling", "regression", "ridge"
NEIGHBOUR, FLOOR, ORIGINAL = "neighbour", "floor", "original"
LABELS = {
    INVERSION: "reconstruction",  # by the inverter's own sampler
    CEILING: "autoencoder",  # the original through the prior's autoencoder alone
    REGRESSION: "regression",  # the decoded latents that a small network predicts from the feature map
    RIDGE: "ridge",  # likewise, by a linear function
    NEIGHBOUR: "neighbour",  # the training image with the most similar feature map
    FLOOR: "floor",  # another image of the test set
    ORIGINAL: "original",
}
"""Methods whose reconstructions of the same images are scored, and their labels in tables and pictures, in the order of
tables. Further samplers follow under their own names."""
METRICS, SCORES, SAMPLES = "metrics.json", "scores.csv", "samples"
HEADLINES = ("cosine", "cosine_calibrated", "agreement@1", "agreement@5", "label@1", "psnr")
COMPARED = {"cosine": False, "agreement@1": True}  # scores whose differences are shown, and whether each is a share


class Name(NamedTuple):
    """A score of a method on a test set or a group of them; it becomes text for loggers and `ModelCheckpoint` only."""

    test_set: str
    score: str
    method: str = INVERSION

    def __str__(self) -> str:
        return f"{self.test_set}/{column(self.score, self.method)}"


def column(score: str, method: str) -> str:
    """The name of a method's score within its test set. Names of scores and methods have no dots."""
    return score if method == INVERSION else f"{score}.{method}"


def label(method: str) -> str:
    """The label of a method in tables and pictures."""
    return LABELS.get(method, method)


class Score(TypedDict):
    """A score, its 95 % confidence interval if it is a mean, and how many images count if not all of the test set."""

    value: float
    low: NotRequired[float]
    high: NotRequired[float]
    n: NotRequired[int]


class Checkpoint(TypedDict):
    """The control that was scored, and the digest of its weights."""

    path: str | None
    step: int
    digest: str


class Provenance(TypedDict):
    """Where scores come from: command, checkpoint, identity of the inverter, sampling, code and data."""

    command: str
    date: str
    checkpoint: Checkpoint
    model: dict[str, Any]
    networks: NotRequired[dict[str, str]]  # names of classifier and prior, which older files lack
    libraries: NotRequired[dict[str, str]]  # their versions
    sampling: dict[str, Any]
    code: dict[str, Any]
    shards: dict[str, str]


class Document(TypedDict):
    """The content of `metrics.json`."""

    samples: dict[str, int]  # images that count, by test set or group
    scores: dict[str, dict[str, dict[str, Score]]]  # by test set or group, method and score
    notes: list[str]  # missing scores, and the reasons
    provenance: Provenance


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
    """All scores of an evaluation; for the other attributes see `Document`."""

    values: dict[Name, Estimate] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    provenance: Provenance | None = None  # if the scores are not written

    def derive(self) -> None:
        """Add `cosine_calibrated` (0 for the floor, 1 for the ceiling) and `<score>_difference` to other methods."""
        for test_set, prefix, score in product(self.counts, ("", "judge_"), COMPARED):
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
        names = dict.fromkeys(name.method for name in self.values)
        return [name for name in LABELS if name in names] + [name for name in names if name not in LABELS]

    @property
    def scores(self) -> dict[Name, Score]:
        """All scores that are not NaN or Inf, by test set as evaluated and by method as in tables."""
        test_sets, methods = list(self.counts), self.methods
        names = sorted(self.values, key=lambda name: (test_sets.index(name.test_set), methods.index(name.method)))
        found = {name: self.values[name] for name in names if np.isfinite(self.values[name].values[0])}
        return {name: as_score(estimate, self.counts[name.test_set]) for name, estimate in found.items()}

    @property
    def document(self) -> Document:
        scores: dict[str, dict[str, dict[str, Score]]] = {}
        for name, found in self.scores.items():
            scores.setdefault(name.test_set, {}).setdefault(name.method, {})[name.score] = found
        provenance = cast(Provenance, self.provenance)
        return {"samples": self.counts, "scores": scores, "notes": self.notes, "provenance": provenance}

    def files(self) -> dict[str, bytes]:
        rows = io.StringIO()
        writer = csv.DictWriter(rows, ["test_set", "method", "score", "value", "low", "high", "n"], lineterminator="\n")
        writer.writeheader()
        for name, found in self.scores.items():
            writer.writerow({**name._asdict(), "n": self.counts[name.test_set], **found})
        return {METRICS: (json.dumps(self.document, indent=2) + "\n").encode(), SCORES: rows.getvalue().encode()}

    def table(self) -> list[list[str]]:
        """Headline scores with their intervals: a head, then a row for each complete data set and method."""
        scores = self.scores
        extra = sorted({name.score for name in self.values if name.score.startswith(("fd_", "fid"))})
        columns = [name for name in (*HEADLINES, *extra) if any(key.score == name for key in self.values)]
        table = [["test set", "n", "method", *columns]]
        for test_set, method in product((name for name in self.counts if "/" not in name), self.methods):
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


def aligned(table: list[list[str]], columns: int | None = None) -> str:
    """A table for the terminal: the first row is its head.

    One that is wider than so many columns goes without intervals, and, if need be, without its last scores.
    """
    hidden: list[str] = []
    while True:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        if columns is None or sum(widths) + 2 * (len(widths) - 1) <= columns or len(widths) == 1:
            break
        plain = [[re.sub(r" \[.*\]$", "", one) for one in row] for row in table]
        if plain == table:
            hidden.insert(0, table[0][-1])
            plain = [row[:-1] for row in table]
        table = plain
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    more = [f"The window is too narrow for: {', '.join(hidden)}."] if hidden else []
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *more])


def validated(kind: TypeAdapter[Any], path: Path, option: str, advice: str) -> Any:
    """Read a JSON file of a certain content; see `read_bytes`."""
    contents = read_json(path, option, advice)
    try:
        return kind.validate_python(contents)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'/'.join(map(repr, first['loc']))[:200]}: {first['msg']}"
        raise UserError(f"{option}: '{path}' does not hold what this version writes ({reason}). {advice}") from error


def read_document(path: Path, option: str) -> Document:
    """Read a `metrics.json`; see `validated`."""
    document: Document = validated(TypeAdapter(Document), path, option, "Test again with the Evaluation callback.")
    return document


def write_samples(root: Path, test_set: str, columns: Mapping[str, Any]) -> None:
    """Write the scores of each image of a test set, in the order of their keys."""
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(dict(columns)).sort_by("key"), buffer)
    write_bytes(root / SAMPLES / f"{test_set}.parquet", buffer.getvalue())


def read_samples(root: Path, group: str, test_sets: Iterable[str]) -> Any:
    """The scores of each image of a test set or group, as a table of pyarrow.

    `test_sets` are all of the run, whose folder `root` may hold tables of earlier ones too.
    """
    tables = []
    for test_set in test_sets:
        path = root / SAMPLES / f"{test_set}.parquet"
        if not (f"{test_set}/".startswith(f"{group}/") and path.is_file()):
            continue
        try:
            tables.append(parquet.read_table(path))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"'{path}' is damaged or holds no scores of samples ({reason}). Test again.") from error
    if not tables:
        raise UserError(f"there are no scores of the samples of '{group}' in '{root / SAMPLES}'. Test again.")
    return pyarrow.concat_tables(tables, promote_options="permissive")
