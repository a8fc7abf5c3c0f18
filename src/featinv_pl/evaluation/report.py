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
from featinv_pl.evaluation.pictures import CURVES, FACTS_FILE, FIRST, PICTURES, cosine_plots, severity_plots
from featinv_pl.evaluation.results import (
    CEILING,
    COMPARED,
    FLOOR,
    INVERSION,
    LABELS,
    METRICS,
    ORIGINAL,
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
from featinv_pl.pages.page import Tile, open_picture, render

ADVICE = "Test again with the Evaluation callback and pictures (`num_images`)."
HEADLINES = ("cosine", "cosine_calibrated", "agreement@1", "agreement@5", "label@1")
CONDITIONS = ConditionalAgreement.names
REPLICATES = 1000
CLEAN = "clean"  # the test set that comes first, where there is one of that name
FEW = 4  # pictures of each part of a group, such as a severity of a corruption

Table = dict[str, list[list[str]]]  # rows, which are a method and its scores, by test set


class Tiles(TypedDict):
    """Facts shown below pictures, and the digest of the tested weights."""

    checkpoint: str | None
    label: list[str | int]
    prediction: list[str | int]
    reconstruction_prediction: list[str | int]
    cosine: list[float]


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

    def pictures(self, test_set: str, kind: str, method: str) -> list[Image.Image]:
        """The pictures of a method, which are stored side by side."""
        strip = open_picture(self.folder / PICTURES / test_set / kind / f"{label(method)}.png", "report")
        side = strip.height
        return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]


def report(folder: Path) -> Path:
    """Write `report.html` and `metrics.json` into a folder that holds a folder per tested inverter.

    Returns:
        The folder of the most faithful one.
    """
    inverters = _inverters(folder)
    documents = {inverter.name: inverter.document for inverter in inverters}
    known = set[str].intersection(*({*one.document["samples"]} & one.pictured for one in inverters))
    test_sets = sorted((name for name in inverters[0].document["samples"] if name in known), key=CLEAN.__ne__)
    if not test_sets:
        raise UserError(f"report: no test set has scores and pictures of every inverter below '{folder}'. {ADVICE}")
    groups, parts = list(dict.fromkeys(name.split("/")[0] for name in test_sets)), dict[str, list[str]]()
    for name in test_sets:
        parts.setdefault(name.split("/")[0], []).append(name)
    notes = dict[str, list[str]]()
    for one in inverters:
        for note in one.document["notes"]:
            notes.setdefault(note, []).append(one.name)
    stages = folder / "stages.json"
    page = render(
        "report.html",
        title="Images from feature maps",
        key=_key_result(inverters[0], groups[0]),
        inverters=inverters,
        head=HEADLINES,
        table=_table(inverters, groups, HEADLINES),
        conditions=CONDITIONS,
        conditional=_table(inverters, groups, CONDITIONS),
        compared=list(COMPARED),
        differences=_differences(inverters, groups),
        notes=notes,
        origins={one.name: _origin(one.document) for one in inverters},
        curves={title: severity_plots(documents, score) for score, title in CURVES.items()},
        histograms=cosine_plots({one.name: one.folder for one in inverters}, groups, test_sets),
        pictures={
            group: {name: _cases(inverters, name, FIRST)[: None if name == group else FEW] for name in names}
            for group, names in parts.items()
        },
        extremes={
            f"{names[-1]}, {one.name}": _cases([one], names[-1], "extremes")
            for one in inverters
            for names in parts.values()
        },
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


def _key_result(inverter: Tested, group: str) -> str:
    """The most faithful inverter's fidelity in one sentence, between what it can reach and chance."""
    count, scores = inverter.document["samples"][group], inverter.scores
    text = f"On '{group}' ({count} images), reconstructions by '{inverter.name}'"
    if cosine := scores.get(Name(group, "cosine")):
        text += f" have feature maps with a cosine of {cell(cosine)} to the originals'"
        limits = ((CEILING, "the prior's autoencoder alone reaches"), (FLOOR, "another image"))
        found = [(said, scores.get(Name(group, "cosine", method))) for method, said in limits]
        if known := [f"{said} {score['value']:.3f}" for said, score in found if score]:
            text += f" ({', '.join(known)})"
    if agreement := scores.get(Name(group, "agreement@1")):
        text += f", and a share of {cell(agreement)} is classified as the original is"
    return f"{text}."


def _cases(inverters: Sequence[Tested], test_set: str, kind: str) -> list[list[Tile]]:
    """For each picture of a test set the original, the autoencoder's and each inverter's reconstruction."""
    first, facts = inverters[0], [one.tiles(test_set, kind) for one in inverters]
    originals, labels = facts[0]["prediction"], facts[0]["label"]
    columns = [
        [
            Tile(picture, f"original: class {seen}" + f"\nlabel {label}" * (label not in (seen, "none", -1)))
            for picture, seen, label in zip(first.pictures(test_set, kind, ORIGINAL), originals, labels, strict=True)
        ],
        [Tile(picture, label(CEILING)) for picture in first.pictures(test_set, kind, CEILING)],
    ]
    for one, found in zip(inverters, facts, strict=True):
        drawn, seen, cosines = (
            one.pictures(test_set, kind, INVERSION),
            found["reconstruction_prediction"],
            found["cosine"],
        )
        columns.append(
            [
                Tile(picture, f"{one.name}: class {name}\ncosine {cosine:.3f}", name != original)
                for picture, name, cosine, original in zip(drawn, seen, cosines, originals, strict=True)
            ]
        )
    return [list(row) for row in zip(*columns, strict=True)]


def _table(inverters: Sequence[Tested], groups: Sequence[str], scores: Sequence[str]) -> Table:
    methods = [(inverter, INVERSION, inverter.name) for inverter in inverters]
    methods += [(inverters[0], method, label(method)) for method in LABELS if method != INVERSION]
    table: Table = {}
    for group, (inverter, method, title) in product(groups, methods):
        cells = [cell(inverter.scores.get(Name(group, score, method))) for score in scores]
        if any(cells):
            count = inverters[0].document["samples"][group]
            table.setdefault(f"{group}, {count} images", []).append([title, *cells])
    return table


def _differences(inverters: Sequence[Tested], groups: Sequence[str]) -> Table:
    """The most faithful inverter minus each other, on the images of both."""
    table: Table = {}
    first, *others = inverters
    for group, other in product(groups, others):
        common = first.document["samples"].keys() & other.document["samples"].keys()
        below = [one for one in sorted(common) if f"{one}/".startswith(f"{group}/")]
        test_sets = [one for one in below if not any(more.startswith(f"{one}/") for more in below)]
        found = differences(first.folder, other.folder, test_sets)
        cells = [cell(results.as_score(estimate, 0)) if estimate.count else "" for estimate in found.values()]
        row = [f"{first.name} - {other.name}", *cells]
        table.setdefault(f"{group}, {found['cosine'].count or 0} images", []).append(row)
    return table


def _origin(document: Document) -> dict[str, str]:
    """Which weights of which networks were scored, and how, and whether their checkpoint has changed since."""
    made_by = document["provenance"]
    checkpoint, model, how = made_by["checkpoint"], made_by["model"], made_by["sampling"]
    digest, path, networks = checkpoint["digest"], Path(checkpoint["path"] or ""), made_by.get("networks", {})
    weights = f"step {checkpoint['step']} of `{path}`" if checkpoint["path"] else "without a checkpoint"
    found = {"control": f"{weights} (weights {digest[:8]}), {model['conditioning']} conditioning"}
    for name, key, more in (("classifier", "backbone", f", layer {model['layer']}"), ("prior", "unet", "")):
        found[name] = f"{networks.get(name, '')} (weights {str(model.get(key))[:8]}){more}".strip()
    sizes = "x".join(map(str, model["feature_shape"]))
    found["sizes"] = f"feature maps of {sizes}, images of {model['image_size']} pixels"
    for name, fields in how["samplers"].items():
        found[f"sampler {label(name)}"] = (
            f"{fields['scheduler']}, {fields['steps']} steps, guidance {fields['guidance_scale']:g} "
            f"({fields['guidance']})"
        )
    found["seed and precision"] = f"{how['seed']}, {how['precision']}"
    commit = made_by["code"].get("commit", "")[:8]
    changed = " with changes" * bool(made_by["code"].get("dirty"))
    code = [f"featinv-pl {made_by['code']['version']}" + f" (commit {commit}{changed})" * bool(commit)]
    found["versions"] = ", ".join(code + [f"{name} {one}" for name, one in made_by.get("libraries", {}).items()])
    found["tested"] = made_by["date"]
    if checkpoint["path"] and path.is_file():
        state = read_checkpoint(path, "report")
        if weights_digest(control_weights(state["state_dict"])) != digest:
            found["warning"] = (
                f"the checkpoint has changed since: it holds step {state['global_step']} now. Test again."
            )
    return found
