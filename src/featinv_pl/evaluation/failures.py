"""Why a classifier errs: what is drawn from the maps of images that it takes for a wrong class, beside controls."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch.nn.functional import cosine_similarity

from featinv_pl.errors import UserError
from featinv_pl.evaluation.results import FLOOR, INVERSION, NEIGHBOUR, as_score, cell, label
from featinv_pl.evaluation.scored_run import (
    ADVERSARIAL,
    CONTROL,
    CORRUPTED,
    JUDGED,
    JUDGED_CONTROL,
    JUDGED_ORIGINAL,
    KINDS,
    METHODS,
    MISCLASSIFIED,
    Case,
    Kind,
    ScoredRun,
)
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.metrics.estimates import Estimate
from featinv_pl.pages.page import Report, Section, Tile, class_name, overlay, prediction

CONTROLS = {
    MISCLASSIFIED: "those of other images of the same label, which the classifier gets right",
    CORRUPTED: "those from the clean images' maps and the same noise",
    ADVERSARIAL: "those from the clean images' maps and the same noise",
}
PAIRS = 12  # of classes that are listed
Found = Mapping[str, Estimate]


@dataclass(frozen=True)
class Errors(Report):
    """Errors of a classifier, what is drawn from their maps, and how often that shows the wrong class."""

    name = "errors"

    backbone: str
    num_classes: int
    kinds: dict[str, Kind]
    gallery: dict[str, list[Case]]
    notes: list[str]
    origin: dict[str, str]  # which weights were tested, and with which seed

    @property
    def about(self) -> dict[str, str]:
        return self.origin

    @cached_property
    def found(self) -> dict[str, Found]:
        """The shares of each kind."""
        return {name: kind.estimates() for name, kind in self.kinds.items()}

    @property
    def title(self) -> str:
        return f"Errors of {self.backbone}"

    @property
    def viewers(self) -> dict[str, tuple[str, str]]:
        """Who looks at drawings, and what it finds in them and in the control; the one that decides is the first."""
        held_out = any(JUDGED in found for found in self.found.values())
        others = {"held-out classifier": (JUDGED, JUDGED_CONTROL)} if held_out else {}
        return {**others, "classifier itself": (INVERSION, CONTROL)}

    @property
    def lead(self) -> str:
        viewer, (own, control) = next(iter(self.viewers.items()))
        answers = [
            f" {name.capitalize()}: {_cell(found, own)} of {found[own].count} drawings, "
            f"{_compared(name, found, own, control)}; as the classifier itself sees them, nearest training images: "
            f"{_cell(found, NEIGHBOUR) or 'not scored'}, other images of the test set: {_cell(found, FLOOR)}."
            for name, found in self.found.items()
            if own in found
        ]
        return (
            "Does a reconstruction show what the classifier saw? Of the images that it takes for a wrong class, the "
            f"share whose drawing the {viewer} takes for the same wrong class, with 95 % intervals.{''.join(answers)} "
            "Where the difference is above 0 and other images have the wrong class less often, the map puts it there."
        )

    def sections(self) -> list[Section]:
        kept = (
            "The share of drawings that are classified as the original is: where that is wrong, and where it is right."
        )
        found = [
            Section("What the drawings show", "The last column: the original, seen by the same.", table=self._seen()),
        ]
        for name, cases in self.gallery.items():
            text = (
                f"From the drawing that shows the wrong class most plainly to the one that does least, by the "
                f"probability that the {next(iter(self.viewers))} gives it: {len(cases)} of "
                f"{self.kinds[name].wrong.sum()}, evenly spaced. Bright: where maps or drawings differ."
            )
            found.append(Section(f"{name.capitalize()} images", text, [_row(case) for case in cases]))
        found += [
            Section("Classes kept, beside baselines", kept, table=self._kept()),
            *(
                Section(f"{name.capitalize()} images: wrong class kept", plot=partial(_plot, kind=kind))
                for name, kind in self.kinds.items()
                if len(_by_strength(kind)) > 1
            ),
            Section("Wrong class kept, by test set", table=self._by_set()),
            Section(f"Wrong class kept, by confusion (the {PAIRS} most frequent)", table=self._by_confusion()),
        ]
        return [*found, *([Section("Notes", " ".join(self.notes))] if self.notes else [])]

    def _seen(self) -> list[list[str]]:
        rows = [["errors", "seen by", "images", "drawing", "control", "difference", "the original"]]
        for (name, found), (viewer, (own, control)) in (
            (one, two) for one in self.found.items() for two in self.viewers.items()
        ):
            if own in found:
                original = _cell(found, JUDGED_ORIGINAL) if own == JUDGED else "1"
                cells = [_cell(found, own), _cell(found, control), _cell(found, own, control), original]
                rows.append([name, viewer, str(found[own].count), *cells])
        return rows

    def _kept(self) -> list[list[str]]:
        methods = self._methods
        rows = [["errors", "class", "images", *map(label, methods)]]
        for name, found in self.found.items():
            for case, suffix in (("wrong", ""), ("right", " right")):
                if (own := INVERSION + suffix) in found:
                    count = str(found[own].count)
                    rows.append([name, case, count, *(_cell(found, one + suffix) for one in methods)])
                    less = [_cell(found, own, one + suffix) for one in methods[1:]]
                    rows.append(["", "reconstruction minus", count, "", *less])
        return rows

    @property
    def _methods(self) -> list[str]:
        return [method for method in METHODS if any(method in kind.values for kind in self.kinds.values())]

    def _by_set(self) -> list[list[str]]:
        groups = [
            (name, f"{one} (epsilon {strength:g})" if name == ADVERSARIAL and strength else one, kind.of_sets([one]))
            for name, kind in self.kinds.items()
            for one, strength in kind.strengths.items()
        ]
        return self._table("test set", groups)

    def _by_confusion(self) -> list[list[str]]:
        groups = []
        for name, kind in self.kinds.items():
            pairs = np.stack([kind.images["label"], kind.images["seen"]], axis=1)
            for pair in np.unique(pairs[kind.wrong], axis=0).tolist():
                title = " → ".join(class_name(one, self.num_classes) for one in pair)
                groups.append((name, title, kind.wrong & (pairs == pair).all(1)))
        return self._table("confusion", sorted(groups, key=lambda group: -int(group[-1].sum()))[:PAIRS])

    def _table(self, head: str, groups: Iterable[tuple[str, str, NDArray[Any]]]) -> list[list[str]]:
        columns = [*self._methods, CONTROL]
        rows = [["errors", head, "images", *map(label, columns)]]
        for name, title, chosen in groups:
            if chosen.any():
                found = self.kinds[name].estimates(chosen)
                rows.append([name, title, str(chosen.sum()), *(_cell(found, one) for one in columns)])
        return rows

    def facts(self) -> dict[str, Any]:
        first = next(iter(self.viewers.values()))
        return {
            "kinds": {
                name: {
                    "difference": as_score(found[first[0]] - found[first[1]], 0) if {*first} <= found.keys() else None,
                    "shares": {one: {**as_score(share, 0), "n": share.count} for one, share in found.items()},
                    "minus": {one: as_score(found[INVERSION] - found[one], 0) for one in METHODS[1:] if one in found},
                }
                for name, found in self.found.items()
            },
            "test_sets": self._by_set(),
            "confusions": self._by_confusion(),
            "gallery": {
                name: [
                    {"key": one.sample["key"], "test_set": one.sample["source"], "wrong_class": one.share}
                    for one in cases
                ]
                for name, cases in self.gallery.items()
            },
            "notes": self.notes,
        }


def _cell(found: Found, name: str, less: str | None = None) -> str:
    """A share, or one minus another, with its interval; empty where it is not known."""
    if not {name, less or name} <= found.keys():
        return ""
    return cell(as_score(found[name] - found[less] if less else found[name], 0))


def _compared(name: str, found: Found, own: str, control: str) -> str:
    if control not in found:
        return "no control"
    share, less = _cell(found, control), _cell(found, own, control)
    return f"{share} of {found[control].count} in the control ({CONTROLS[name]}), difference {less}"


def _by_strength(kind: Kind) -> dict[float, NDArray[Any]]:
    """The errors at each severity, or each epsilon."""
    known = sorted({one for one in kind.strengths.values() if one is not None})
    chosen = {one: kind.of_sets([name for name in kind.strengths if kind.strengths[name] == one]) for one in known}
    return {one: rows for one, rows in chosen.items() if rows.any()}


def _plot(axes: Axes, kind: Kind) -> None:
    found = {strength: kind.estimates(rows) for strength, rows in _by_strength(kind).items()}
    for name in (*METHODS, CONTROL):
        points = {x: as_score(one[name], 0) for x, one in found.items() if name in one}
        if points:
            (line,) = axes.plot([*points], [one["value"] for one in points.values()], marker=".", label=label(name))
            low = [one.get("low", one["value"]) for one in points.values()]
            high = [one.get("high", one["value"]) for one in points.values()]
            axes.fill_between([*points], low, high, color=line.get_color(), alpha=0.1, linewidth=0)
    text = "severity, or an attack's epsilon in grey levels"
    axes.set(xlabel=text, ylabel="share", ylim=(-0.02, 1.02), xticks=[*found])
    axes.legend(fontsize="x-small", ncols=2)


def _row(case: Case) -> list[Tile]:
    """Original and drawing, with those of the clean image in front where there is one, and where they differ."""
    sample, drawing = case.sample, case.drawing
    pictures = as_picture(sample["images"]), as_picture(drawing["images"])
    name = sample["source"] if case.clean else f"label {class_name(int(sample['labels']), len(sample['logits']))}"
    tiles = [
        Tile(pictures[0], f"{name}\nclass {prediction(sample['logits'])}", True),
        Tile(pictures[1], f"drawn: class {prediction(drawing['logits'])}\nthe wrong class: {case.share:.0%}"),
    ]
    first, second = (sample["features"], drawing["features"]), (sample["images"], drawing["images"])
    if case.clean:
        clean, drawn = case.clean
        tiles[:0] = [
            Tile(as_picture(clean["images"]), f"clean\nclass {prediction(clean['logits'])}"),
            Tile(as_picture(drawn["images"]), f"drawn: class {prediction(drawn['logits'])}"),
        ]
        first, second = (clean["features"], sample["features"]), (drawn["images"], drawing["images"])
    apart = 1 - cosine_similarity(first[0].float().cpu(), first[1].float().cpu(), dim=0)  # (h, w), from 0 to 2
    pixels = (second[0].cpu() - second[1].cpu()).abs().mean(0) / 2  # (H, W), from 0 to 1
    for what, where, shown in (("maps", apart, pictures[0]), ("pixels", pixels, pictures[1])):
        top = where.max().item()
        tiles.append(Tile(overlay(shown, where / max(top, 1e-6)), f"bright: {what} differ\nup to {top:.2f}"))
    return tiles


def find_errors(folder: Path, num_images: int, device: str | torch.device) -> Errors:
    """Why a tested run's classifier errs; scores and reconstructions are those that `test` has stored.

    Raises:
        UserError: The run is not tested, its files have changed since, or the classifier makes no error.
    """
    run = ScoredRun.open(folder, device)
    kinds = run.kinds()
    if not kinds:
        raise UserError(
            f"RUN: there is no error to show among the images of {', '.join(run.sets) or 'no test set'}, whose shards "
            "and scores are compared. Test on harder sets, such as those of `CorruptedData` or `AdversarialExtraction`."
        )
    absent = [f"There are no {name} images: no test set that was scored has such errors." for name in KINDS]
    notes = [*run.notes, *(note for name, note in zip(KINDS, absent, strict=True) if name not in kinds)]
    gallery = {name: run.cases(name, kind, num_images) for name, kind in kinds.items()}
    classifier = run.reconstructions.inverter.classifier
    made_by = run.document["provenance"]
    weights = made_by["checkpoint"]
    origin = {
        "model": f"step {weights['step']} of `{weights['path']}` (weights {weights['digest'][:8]})",
        "seed": str(made_by["sampling"]["seed"]),
        "tested on": made_by["date"],
    }
    return Errors(classifier.title, classifier.num_classes, kinds, gallery, notes, origin)
