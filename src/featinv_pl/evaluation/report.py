"""One self-contained page from scored inversions: pictures, tables, curves."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.evaluation import differences
from featinv_pl.evaluation.arms import ARMS, INVERSION, label
from featinv_pl.evaluation.plots import cosine_histograms, png, severity_curves
from featinv_pl.evaluation.reconstruction_grid import EXTREMES, FACTS_FILE, FIRST, PICTURES
from featinv_pl.evaluation.results import METRICS, Document, Name, Score, as_score, by_name, cell, read_document
from featinv_pl.files import read_json, write_bytes
from featinv_pl.nets.frozen import weights_digest
from featinv_pl.nets.weights import read_checkpoint
from featinv_pl.pages.page import data_uri, picture_uri, render
from featinv_pl.pages.pictures import open_picture

STAGES = "stages.json"
ADVICE = "Test again with the ReconstructionGrid callback."
CONDITIONS = (
    *("agreement@1_right", "agreement@1_wrong", "label@1_wrong"),
    *("agreement@1_resisted", "agreement@1_fooled", "label@1_fooled"),
)
HEADLINES = ("cosine", "cosine_calibrated", "agreement@1", "agreement@5", "label@1")


TableRow = tuple[str, int, str, list[str]]
"""Source, number of images, what is scored, and its scores."""


class Tiles(TypedDict):
    """What the page shows below pictures."""

    checkpoint: str | None
    """Digest of the weights that were tested."""
    prediction: list[str | int]
    reconstruction_prediction: list[str | int]


class Record(TypedDict):
    """What the page shows of a stage."""

    command: str
    seconds: float


TILES = TypeAdapter(Tiles)
RECORDS = TypeAdapter(dict[str, Record])


@dataclass(frozen=True)
class Inverter:
    """One scored inverter.

    Attributes:
        name: Name of its folder.
        folder: Holds `metrics.json`, `samples/` and `pictures/`.
        document: The content of `metrics.json`.
    """

    name: str
    folder: Path
    document: Document

    @property
    def scores(self) -> dict[Name, Score]:
        """All scores."""
        return by_name(self.document)

    def tiles(self, source: str, kind: str) -> Tiles:
        """Predictions of the pictured images."""
        path = self.folder / PICTURES / source / kind / FACTS_FILE
        try:
            tiles = TILES.validate_python(read_json(path, "report", ADVICE))
        except ValidationError as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"report: '{path}' describes no pictures ({reason}). {ADVICE}") from error
        scored, pictured = self.document["provenance"]["checkpoint"]["digest"], str(tiles["checkpoint"])
        if pictured != scored:
            raise UserError(
                f"report: the pictures in '{path.parent}' are of other weights ({pictured[:8]}) than the scores in "
                f"'{self.folder / METRICS}' ({scored[:8]}). Test again with PerSource and ReconstructionGrid."
            )
        return tiles

    @property
    def pictured(self) -> set[str]:
        """The sources of which there are pictures."""
        root = self.folder / PICTURES
        return {path.parent.parent.relative_to(root).as_posix() for path in root.rglob(FACTS_FILE)}

    def strip(self, source: str, kind: str, row: str) -> Image.Image:
        """The picture of one row of tiles."""
        return open_picture(self.folder / PICTURES / source / kind / f"{row}.png", "report")


def report(folder: Path) -> None:
    """Write `report.html`, `metrics.json` and `overview.png` from the inverters scored below a folder.

    Args:
        folder: Holds one folder per inverter, as `test` has left it.
    """
    inverters = _inverters(folder)
    documents = {inverter.name: inverter.document for inverter in inverters}
    sources = _sources(inverters)
    if not sources:
        found = "; ".join(map(_found, inverters))
        raise UserError(f"report: '{folder}' has no test set with scores and pictures of every one: {found}. {ADVICE}")
    groups = list(dict.fromkeys(source.split("/")[0] for source in sources))
    curves = severity_curves(documents)
    page = render(
        "report.html",
        inverters=inverters,
        head=HEADLINES,
        table=_table(inverters, groups, HEADLINES),
        conditions=CONDITIONS,
        conditional=_table(inverters, groups, CONDITIONS),
        compared=list(differences.SCORES),
        differences=_differences(inverters, groups),
        notes=[
            (inverter.name, note)
            for inverter in inverters
            for note in (*_origin(inverter.document), *inverter.document["notes"])
        ],
        curves=curves and data_uri(curves),
        histograms=data_uri(
            cosine_histograms({inverter.name: inverter.folder for inverter in inverters}, groups, sources)
        ),
        pictures=[(source, _rows(inverters, source)) for source in sources],
        extremes=[
            (f"{group}, {inverter.name}", _extremes(inverter, source))
            for inverter in inverters
            for group, source in _last_of(groups, sources).items()
        ],
        all_scores=_all_scores(inverters),
        stages=_stages(folder / STAGES),
    )
    metrics = json.dumps(documents, indent=2) + "\n"
    write_bytes(folder / METRICS, metrics.encode())
    write_bytes(folder / "overview.png", _overview(inverters, _last_of(groups, sources)))
    write_bytes(folder / "report.html", page.encode())


def _stages(path: Path) -> dict[str, Record]:
    """The commands that made all this, if a demo has left them."""
    if not path.is_file():
        return {}
    try:
        return RECORDS.validate_python(read_json(path, "report", "Remove it."))
    except ValidationError as error:
        raise UserError(
            f"report: '{path}' lists no stages ({' '.join(str(error).split())[:300]}). Remove it."
        ) from error


def _inverters(folder: Path) -> list[Inverter]:
    """The scored inverters, the most faithful first."""
    found = [
        Inverter(path.parent.name, path.parent, read_document(path, "report")) for path in folder.glob(f"*/{METRICS}")
    ]
    if not found:
        raise UserError(
            f"report: there is no scored inverter below '{folder}', that is, no <name>/{METRICS}. "
            "Run `featinv-pl test` with the PerSource callback and a default_root_dir below that folder first."
        )

    for inverter in found:
        command = inverter.document["provenance"]["command"]
        if command != "test":
            raise UserError(
                f"report: the scores in '{inverter.folder / METRICS}' are those of `{command}`, and a report shows "
                "those of `test`. Run `featinv-pl test`, or give the folder above that of the run."
            )

    def fidelity(inverter: Inverter) -> float:
        found = inverter.scores.items()
        cosines = [score["value"] for name, score in found if (name.score, name.arm) == ("cosine", INVERSION)]
        return sum(cosines) / max(len(cosines), 1)

    return sorted(found, key=fidelity, reverse=True)


def _table(inverters: list[Inverter], groups: list[str], scores: Sequence[str]) -> list[TableRow]:
    """Source, number of samples, arm and scores: each inverter, then what they are measured against."""
    arms = [(inverter, INVERSION, inverter.name) for inverter in inverters]
    arms += [(inverters[0], arm, label(arm)) for arm in ARMS if arm != INVERSION]
    rows = []
    for group in groups:
        for inverter, arm, title in arms:
            cells = [cell(inverter.scores.get(Name(group, score, arm))) for score in scores]
            if any(cells):
                rows.append((group, inverter.document["samples"][group], title, cells))
    return rows


def _differences(inverters: list[Inverter], groups: list[str]) -> list[TableRow]:
    """Source, number of images, and what the most faithful inverter has more than each other on these."""
    rows = []
    for group in groups:
        for other in inverters[1:]:
            common = inverters[0].document["samples"].keys() & other.document["samples"].keys()
            below = [source for source in sorted(common) if f"{source}/".startswith(f"{group}/")]
            sources = [source for source in below if not any(more.startswith(f"{source}/") for more in below)]
            found = differences.differences(inverters[0].folder, other.folder, sources)
            cells = [cell(as_score(estimate, 0)) if estimate.count else "" for estimate in found.values()]
            rows.append((group, found["cosine"].count or 0, f"{inverters[0].name} - {other.name}", cells))
    return rows


def _all_scores(inverters: list[Inverter]) -> list[tuple[str, list[float | None]]]:
    """Every score under its whole name, with its value for each inverter."""
    found = [inverter.scores for inverter in inverters]
    names = sorted({name for scores in found for name in scores})
    return [(str(name), [scores[name]["value"] if name in scores else None for scores in found]) for name in names]


def _sources(inverters: list[Inverter]) -> list[str]:
    """Sources scored and pictured by every inverter: data sets first, then corruptions by name and severity."""
    known = [set(inverter.document["samples"]) & inverter.pictured for inverter in inverters]
    return sorted(set.intersection(*known), key=lambda source: (source.count("/"), source))


def _found(inverter: Inverter) -> str:
    """What there is of an inverter, in an error's words."""
    scored, pictured = (
        ", ".join(dict.fromkeys(source.split("/")[0] for source in sorted(sources))) or "nothing"
        for sources in (inverter.document["samples"], inverter.pictured)
    )
    return f"'{inverter.name}' has scores of {scored} and pictures of {pictured}"


def _origin(document: Document) -> list[str]:
    """Which weights were scored, and whether their checkpoint holds others by now."""
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


def _last_of(groups: list[str], sources: list[str]) -> dict[str, str]:
    """The last source of each group."""
    return {group: [source for source in sources if source.split("/")[0] == group][-1] for group in groups}


def _extremes(inverter: Inverter, source: str) -> list[dict[str, Any]]:
    """Rows of the best, median and worst images of one inverter."""
    facts = inverter.tiles(source, EXTREMES)
    classes = {"original": facts["prediction"], "reconstruction": facts["reconstruction_prediction"]}
    return [
        {"name": row, "image": picture_uri(inverter.strip(source, EXTREMES, row)), "classes": shown}
        for row, shown in classes.items()
    ]


def _rows(inverters: list[Inverter], source: str) -> list[dict[str, Any]]:
    """Rows of a picture: the original, the autoencoder alone, and each inverter."""
    first = inverters[0]
    tiles = first.tiles(source, FIRST)
    rows: list[dict[str, Any]] = [
        {"name": "original", "image": first.strip(source, FIRST, "original"), "classes": tiles["prediction"]},
        {"name": "autoencoder", "image": first.strip(source, FIRST, "autoencoder"), "classes": []},
    ]
    for inverter in inverters:
        facts = inverter.tiles(source, FIRST)
        image = inverter.strip(source, FIRST, "reconstruction")
        rows.append({"name": inverter.name, "image": image, "classes": facts["reconstruction_prediction"]})
    return [{**row, "image": picture_uri(row["image"])} for row in rows]


def _overview(inverters: list[Inverter], chosen: dict[str, str]) -> bytes:
    """One picture: originals above their reconstructions, as PNG."""
    height = (0.8 * (len(inverters) + 1) + 0.4) * len(chosen)
    figure = Figure(figsize=(9, height), layout="constrained")
    parts = figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]
    for part, source in zip(parts, chosen.values(), strict=True):
        rows = [("original", inverters[0].strip(source, FIRST, "original"))]
        rows += [(inverter.name, inverter.strip(source, FIRST, "reconstruction")) for inverter in inverters]
        part.suptitle(source, fontsize="medium")
        for axes, (name, picture) in zip(part.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
            axes.imshow(np.asarray(picture), aspect="equal")
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
            axes.set(xticks=[], yticks=[])
    return png(figure)
