"""One self-contained page from tested inverters: pictures, tables, curves."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import TypeAdapter
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.evaluation import results
from featinv_pl.evaluation.pictures import FACTS_FILE, PICTURES, cosine_histograms, severity_curves
from featinv_pl.evaluation.results import (
    COMPARED,
    INVERSION,
    LABELS,
    METRICS,
    Document,
    Name,
    by_name,
    cell,
    label,
    read_samples,
)
from featinv_pl.files import read_json, write_bytes
from featinv_pl.inverter.identity import control_weights
from featinv_pl.metrics.agreement import ConditionalAgreement
from featinv_pl.metrics.estimates import Estimate, ImageSums, estimates
from featinv_pl.nets.frozen import weights_digest
from featinv_pl.nets.weights import read_checkpoint
from featinv_pl.pages.page import data_uri, open_picture, render

ADVICE = "Test again with the Evaluation callback and pictures (`num_images`)."
HEADLINES = ("cosine", "cosine_calibrated", "agreement@1", "agreement@5", "label@1")
CONDITIONS = ConditionalAgreement.names
REPLICATES = 1000

TableRow = tuple[str, int, str, list[str]]  # test set, number of images, method, and its scores


class Tiles(TypedDict):
    """Facts shown below pictures, and the digest of the tested weights."""

    checkpoint: str | None
    prediction: list[str | int]
    reconstruction_prediction: list[str | int]


@dataclass(frozen=True)
class Tested:
    """A tested inverter: its name, the folder with what `test` left, and the content of `metrics.json` there."""

    name: str
    folder: Path
    document: Document

    @cached_property
    def scores(self) -> dict[Name, results.Score]:
        return by_name(self.document)

    @property
    def pictured(self) -> set[str]:
        root = self.folder / PICTURES
        return {path.parent.parent.relative_to(root).as_posix() for path in root.rglob(FACTS_FILE)}

    def tiles(self, test_set: str, kind: str) -> Tiles:
        path = self.folder / PICTURES / test_set / kind / FACTS_FILE
        tiles: Tiles = results.validated(TypeAdapter(Tiles), path, "report", ADVICE)
        scored, pictured = self.document["provenance"]["checkpoint"]["digest"], str(tiles["checkpoint"])
        if pictured != scored:
            scores = f"the scores in '{self.folder / METRICS}' ({scored[:8]})"
            pictures = f"the pictures in '{path.parent}' are of other weights ({pictured[:8]})"
            raise UserError(f"report: {pictures} than {scores}. {ADVICE}")
        return tiles

    def strip(self, test_set: str, kind: str, row: str) -> Image.Image:
        return open_picture(self.folder / PICTURES / test_set / kind / f"{row}.png", "report")


def report(folder: Path) -> Path:
    """Write `report.html` and `metrics.json` into a folder that holds a folder per tested inverter.

    Returns:
        The folder of the most faithful one.
    """
    inverters = _inverters(folder)
    documents = {inverter.name: inverter.document for inverter in inverters}
    known = [set(inverter.document["samples"]) & inverter.pictured for inverter in inverters]
    # Data sets first, then corruptions by name and severity.
    test_sets = sorted(set.intersection(*known), key=lambda test_set: (test_set.count("/"), test_set))
    if not test_sets:
        raise UserError(f"report: no test set has scores and pictures of every inverter below '{folder}'. {ADVICE}")
    last = {test_set.split("/")[0]: test_set for test_set in test_sets}
    groups, stages = list(last), folder / "stages.json"
    curves, folders = severity_curves(documents), {inverter.name: inverter.folder for inverter in inverters}
    page = render(
        "report.html",
        inverters=inverters,
        head=HEADLINES,
        table=_table(inverters, groups, HEADLINES),
        conditions=CONDITIONS,
        conditional=_table(inverters, groups, CONDITIONS),
        compared=list(COMPARED),
        differences=_differences(inverters, groups),
        notes=[(one.name, note) for one in inverters for note in (_origin(one.document), *one.document["notes"])],
        curves=curves and data_uri(curves),
        histograms=data_uri(cosine_histograms(folders, groups, test_sets)),
        test_sets=test_sets,
        last=last,
        names=sorted({name for inverter in inverters for name in inverter.scores}),
        stages=read_json(stages, "report", "Remove it.") if stages.is_file() else {},
    )
    write_bytes(folder / METRICS, (json.dumps(documents, indent=2) + "\n").encode())
    write_bytes(folder / "report.html", page.encode())
    return inverters[0].folder


def differences(one: Path, other: Path, test_sets: Iterable[str]) -> dict[str, Estimate]:
    """The scores of one inverter minus those of another, by the folders of their runs and test sets of both.

    Images are matched by test set and key, and resampled by key: the corruptions of one image are one image.
    """
    count, names = len(COMPARED), [*COMPARED, *(f"{score} other" for score in COMPARED)]
    sums = ImageSums(2 * count)
    for test_set in test_sets:
        ours, theirs = (read_samples(folder, test_set, [test_set]) for folder in (one, other))
        both = ours.join(theirs, "key", join_type="inner", right_suffix=" other").sort_by("key")
        known = {name: both[name].to_numpy().astype(np.float64) for name in names if name in both.column_names}
        values = np.stack([known.get(name, np.full(len(both), np.nan)) for name in names], axis=1)
        values[np.tile(~np.isfinite(values[:, :count] + values[:, count:]), 2)] = np.nan
        sums.add(both["key"].to_pylist(), values)
    found = estimates(list(sums.rows), sums.sums, sums.counts, [*COMPARED.values()] * 2, REPLICATES)
    return {score: own - theirs for score, own, theirs in zip(COMPARED, found[:count], found[count:], strict=True)}


def _inverters(folder: Path) -> list[Tested]:
    """All tested inverters, the most faithful first."""
    paths = list(folder.glob(f"*/{METRICS}"))
    own = folder / METRICS  # of a run; that of an earlier report has the scores of several
    if own.is_file() and "provenance" in read_json(own, "report", ADVICE):
        above = Path(os.path.relpath(folder.absolute().parent))
        raise UserError(f"report: '{folder}' is a run itself. Give the folder above: `featinv-pl report {above}`.")
    found = [Tested(path.parent.name, path.parent, results.read_document(path, "report")) for path in paths]
    if not found:
        raise UserError(
            f"report: there is no scored inverter below '{folder}', that is, no <name>/{METRICS}. "
            "Run `featinv-pl test` with the Evaluation callback and a default_root_dir below that folder first."
        )
    for inverter in found:
        if (command := inverter.document["provenance"]["command"]) != "test":
            raise UserError(
                f"report: the scores in '{inverter.folder / METRICS}' are those of `{command}`, and a report shows "
                "those of `test`. Run `featinv-pl test`, or give the folder above that of the run."
            )

    def fidelity(inverter: Tested) -> float:  # over test sets and groups
        own = [score["value"] for name, score in inverter.scores.items() if name[1:] == ("cosine", INVERSION)]
        return float(np.mean(own or [0]))

    return sorted(found, key=fidelity, reverse=True)


def _table(inverters: Sequence[Tested], groups: Sequence[str], scores: Sequence[str]) -> list[TableRow]:
    methods = [(inverter, INVERSION, inverter.name) for inverter in inverters]
    methods += [(inverters[0], method, label(method)) for method in LABELS if method != INVERSION]
    rows = []
    for group, (inverter, method, title) in product(groups, methods):
        cells = [cell(inverter.scores.get(Name(group, score, method))) for score in scores]
        if any(cells):
            rows.append((group, inverter.document["samples"][group], title, cells))
    return rows


def _differences(inverters: Sequence[Tested], groups: Sequence[str]) -> list[TableRow]:
    """The most faithful inverter minus each other, on the images of both."""
    rows = []
    first, *others = inverters
    for group, other in product(groups, others):
        common = first.document["samples"].keys() & other.document["samples"].keys()
        below = [one for one in sorted(common) if f"{one}/".startswith(f"{group}/")]
        test_sets = [one for one in below if not any(more.startswith(f"{one}/") for more in below)]
        found = differences(first.folder, other.folder, test_sets)
        cells = [cell(results.as_score(estimate, 0)) if estimate.count else "" for estimate in found.values()]
        rows.append((group, found["cosine"].count or 0, f"{first.name} - {other.name}", cells))
    return rows


def _origin(document: Document) -> str:
    """Which weights were scored, and whether their checkpoint has changed since."""
    date, checkpoint = document["provenance"]["date"], document["provenance"]["checkpoint"]
    if checkpoint["path"] is None:
        return f"tested on {date} without a checkpoint"
    digest, path = checkpoint["digest"], Path(checkpoint["path"])
    note = f"tested on {date}: step {checkpoint['step']} of '{path}' (weights {digest[:8]})"
    if path.is_file():
        state = read_checkpoint(path, "report")
        if weights_digest(control_weights(state["state_dict"])) != digest:
            note += f", which has changed since: it holds step {state['global_step']} now. Test again."
    return note
