"""One self-contained page from tested inverters: pictures, tables, curves."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.evaluation import differences
from featinv_pl.evaluation.methods import INVERSION, LABELS, label
from featinv_pl.evaluation.pictures import FACTS_FILE, FIRST, PICTURES
from featinv_pl.evaluation.plots import cosine_histograms, severity_curves
from featinv_pl.evaluation.results import METRICS, Document, Name, Score, as_score, by_name, cell, read_document
from featinv_pl.files import read_json, write_bytes
from featinv_pl.nets.frozen import weights_digest
from featinv_pl.nets.weights import read_checkpoint
from featinv_pl.pages.page import data_uri, render
from featinv_pl.pages.pictures import figure_png, open_picture

STAGES = "stages.json"
ADVICE = "Test again with the Evaluation callback and pictures (`num_images`)."
HEADLINES = ("cosine", "cosine_calibrated", "agreement@1", "agreement@5", "label@1")
CONDITIONS = (
    *("agreement@1_right", "agreement@1_wrong", "label@1_wrong"),
    *("agreement@1_resisted", "agreement@1_fooled", "label@1_fooled"),
)

TableRow = tuple[str, int, str, list[str]]
"""Test set, number of images, method, and its scores."""


class Tiles(TypedDict):
    """Facts shown below pictures, and the digest of the tested weights."""

    checkpoint: str | None
    prediction: list[str | int]
    reconstruction_prediction: list[str | int]


class Record(TypedDict):
    """One row of the page's table of stages."""

    command: str
    seconds: float


TILES, RECORDS = TypeAdapter(Tiles), TypeAdapter(dict[str, Record])


@dataclass(frozen=True)
class Tested:
    """A tested inverter: its name, the folder with what `test` left, and the content of `metrics.json` there."""

    name: str
    folder: Path
    document: Document

    @cached_property
    def scores(self) -> dict[Name, Score]:
        """All scores."""
        return by_name(self.document)

    @property
    def fidelity(self) -> float:
        """The mean of its cosines over test sets and groups."""
        cosines = [
            score["value"] for name, score in self.scores.items() if (name.score, name.method) == ("cosine", INVERSION)
        ]
        return sum(cosines) / max(len(cosines), 1)

    @property
    def pictured(self) -> set[str]:
        """The test sets that have pictures."""
        root = self.folder / PICTURES
        return {path.parent.parent.relative_to(root).as_posix() for path in root.rglob(FACTS_FILE)}

    def tiles(self, test_set: str, kind: str) -> Tiles:
        """Predictions of the pictured images."""
        path = self.folder / PICTURES / test_set / kind / FACTS_FILE
        tiles: Tiles = _validated(TILES, path, ADVICE)
        scored, pictured = self.document["provenance"]["checkpoint"]["digest"], str(tiles["checkpoint"])
        if pictured != scored:
            raise UserError(
                f"report: the pictures in '{path.parent}' are of other weights ({pictured[:8]}) than the scores in "
                f"'{self.folder / METRICS}' ({scored[:8]}). {ADVICE}"
            )
        return tiles

    def strip(self, test_set: str, kind: str, row: str) -> Image.Image:
        """The picture of one row of tiles."""
        return open_picture(self.folder / PICTURES / test_set / kind / f"{row}.png", "report")


def report(folder: Path) -> None:
    """Write `report.html`, `metrics.json` and `overview.png` into a folder that holds a folder per tested inverter.

    Raises:
        UserError: There is no inverter, or nothing that all have.
    """
    inverters = _inverters(folder)
    documents = {inverter.name: inverter.document for inverter in inverters}
    test_sets = _test_sets(inverters)
    if not test_sets:
        found = "; ".join(map(_found, inverters))
        raise UserError(f"report: '{folder}' has no test set with scores and pictures of every one: {found}. {ADVICE}")
    groups = list(dict.fromkeys(test_set.split("/")[0] for test_set in test_sets))
    last = {test_set.split("/")[0]: test_set for test_set in test_sets}
    curves, folders = severity_curves(documents), {inverter.name: inverter.folder for inverter in inverters}
    page = render(
        "report.html",
        inverters=inverters,
        head=HEADLINES,
        table=_table(inverters, groups, HEADLINES),
        conditions=CONDITIONS,
        conditional=_table(inverters, groups, CONDITIONS),
        compared=list(differences.SCORES),
        differences=_differences(inverters, groups),
        notes=[(one.name, note) for one in inverters for note in (*_origin(one.document), *one.document["notes"])],
        curves=curves and data_uri(curves),
        histograms=data_uri(cosine_histograms(folders, groups, test_sets)),
        test_sets=test_sets,
        last=last,
        names=sorted({name for inverter in inverters for name in inverter.scores}),
        stages=_validated(RECORDS, folder / STAGES, "Remove it.") if (folder / STAGES).is_file() else {},
    )
    write_bytes(folder / METRICS, (json.dumps(documents, indent=2) + "\n").encode())
    write_bytes(folder / "overview.png", _overview(inverters, last))
    write_bytes(folder / "report.html", page.encode())


def _validated(kind: TypeAdapter[Any], path: Path, advice: str) -> Any:
    try:
        return kind.validate_python(read_json(path, "report", advice))
    except ValidationError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"report: '{path}' does not have the expected content ({reason}). {advice}") from error


def _inverters(folder: Path) -> list[Tested]:
    found = [
        Tested(path.parent.name, path.parent, read_document(path, "report")) for path in folder.glob(f"*/{METRICS}")
    ]
    if not found:
        raise UserError(
            f"report: there is no scored inverter below '{folder}', that is, no <name>/{METRICS}. "
            "Run `featinv-pl test` with the Evaluation callback and a default_root_dir below that folder first."
        )
    for inverter in found:
        command = inverter.document["provenance"]["command"]
        if command != "test":
            raise UserError(
                f"report: the scores in '{inverter.folder / METRICS}' are those of `{command}`, and a report shows "
                "those of `test`. Run `featinv-pl test`, or give the folder above that of the run."
            )
    return sorted(found, key=lambda inverter: inverter.fidelity, reverse=True)


def _test_sets(inverters: Sequence[Tested]) -> list[str]:
    """Test sets scored and pictured by every inverter: data sets first, then corruptions by name and severity."""
    known = [set(inverter.document["samples"]) & inverter.pictured for inverter in inverters]
    return sorted(set.intersection(*known), key=lambda test_set: (test_set.count("/"), test_set))


def _found(inverter: Tested) -> str:
    scored, pictured = (
        ", ".join(dict.fromkeys(test_set.split("/")[0] for test_set in sorted(names))) or "nothing"
        for names in (inverter.document["samples"], inverter.pictured)
    )
    return f"'{inverter.name}' has scores of {scored} and pictures of {pictured}"


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
        found = differences.differences(first.folder, other.folder, test_sets)
        cells = [cell(as_score(estimate, 0)) if estimate.count else "" for estimate in found.values()]
        rows.append((group, found["cosine"].count or 0, f"{first.name} - {other.name}", cells))
    return rows


def _origin(document: Document) -> list[str]:
    """Which weights were scored, and whether their checkpoint has changed since."""
    provenance = document["provenance"]
    checkpoint = provenance["checkpoint"]
    digest, path = checkpoint["digest"], Path(checkpoint["path"] or "")
    notes = [f"tested on {provenance['date']}: step {checkpoint['step']} of '{path}' (weights {digest[:8]})"]
    if path.is_file():
        state = read_checkpoint(path, "report")
        weights = {name.removeprefix("control."): value for name, value in state["state_dict"].items()}
        if weights_digest(weights) != digest:
            notes.append(f"'{path}' has changed since: it holds step {state['global_step']} now. Test again.")
    return notes if checkpoint["path"] else [f"tested on {provenance['date']} without a checkpoint"]


def _overview(inverters: Sequence[Tested], chosen: Mapping[str, str]) -> bytes:
    """One picture: originals above their reconstructions, as PNG."""
    height = (0.8 * (len(inverters) + 1) + 0.4) * len(chosen)
    figure = Figure(figsize=(9, height), layout="constrained")
    parts = figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]
    for part, test_set in zip(parts, chosen.values(), strict=True):
        rows = [("original", inverters[0].strip(test_set, FIRST, "original"))]
        rows += [(inverter.name, inverter.strip(test_set, FIRST, "reconstruction")) for inverter in inverters]
        part.suptitle(test_set, fontsize="medium")
        for axes, (name, picture) in zip(part.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
            axes.imshow(np.asarray(picture), aspect="equal")
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
            axes.set(xticks=[], yticks=[])
    return figure_png(figure)
