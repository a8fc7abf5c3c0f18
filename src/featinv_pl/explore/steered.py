"""Steering over a set of pictures: the wanted change beside those of control edits, with bands and paired tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm.auto import tqdm

from featinv_pl.errors import UserError
from featinv_pl.explore.concepts import Concepts
from featinv_pl.explore.effects import CLASSIFIED, EDIT, EXPLAINED, LABELS, RANDOM, REACHED, SCORE, plot_arms
from featinv_pl.explore.exploration import classify, tile
from featinv_pl.explore.sets import Difference, Pictures, Values, cell, difference, limits, means, numbers, shown_p
from featinv_pl.explore.steering import Edit, Steering, furthest, rank_correlation, steer_map
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.metrics.estimates import Estimate
from featinv_pl.pages.page import Report, Section, Tile

SHOWN = 8  # pictures
SHARES = (REACHED, CLASSIFIED)


@dataclass(frozen=True)
class Steered(Report):
    """What an edit and its controls changed in the reconstructions of a set of pictures."""

    name = "steered"

    concepts: Concepts
    number: int
    edit: Edit
    strengths: list[float]  # S
    step: int  # at which the edit changes maps most, where tests are made
    keys: list[str]  # n, of the pictures
    num_samples: int
    arms: dict[str, dict[str, Values]]  # by edit or control and measure (n, S), averaged over the samples of a picture
    unedited: dict[str, Values]  # by measure (n,)
    ranks: list[float]  # Spearman's correlation of strength and score, of pictures for which it is defined
    rows: list[list[Tile]]

    @cached_property
    def found(self) -> dict[str, dict[str, list[Estimate]]]:
        """The mean of each measure over pictures, by edit or control and step."""
        return {
            arm: {measure: means(self.keys, values, self._shares(measure)) for measure, values in measures.items()}
            for arm, measures in self.arms.items()
        }

    @cached_property
    def plain(self) -> dict[str, Estimate]:
        """The mean of each measure over pictures, of plain reconstructions."""
        return {
            measure: means(self.keys, values[:, None], self._shares(measure))[0]
            for measure, values in self.unedited.items()
        }

    @cached_property
    def tests(self) -> dict[str, dict[str, Difference]]:
        """By measure and control: the paired difference, edit minus control."""
        return {
            measure: {
                control: difference(
                    self.keys,
                    values[:, self.step],
                    self.arms[control][measure][:, self.step],
                    self._shares(measure),
                )
                for control in self.controls
            }
            for measure, values in self.arms[EDIT].items()
        }

    def _shares(self, measure: str) -> bool:
        return measure in SHARES and self.num_samples == 1

    @property
    def controls(self) -> list[str]:
        return [name for name in self.arms if name != EDIT]

    @property
    def title(self) -> str:
        return f"Steering {len(self.keys)} pictures: {self.edit} {self.concepts.names[self.number]}"

    @property
    def lead(self) -> str:
        strength, (minus, p) = self.strengths[self.step], self.tests[REACHED][RANDOM]
        reached = [f"{name} {cell(found[REACHED][self.step])}" for name, found in self.found.items()]
        classified = (
            f" Classified as asked for: unedited {cell(self.plain[CLASSIFIED])}, "
            + ", ".join(f"{name} {cell(found[CLASSIFIED][self.step])}" for name, found in self.found.items())
            + "."
            if CLASSIFIED in self.plain
            else ""
        )
        rank = f" Spearman of strength and score: {np.mean(self.ranks):.2f} on average." if self.ranks else ""
        samples = "1 sample" if self.num_samples == 1 else f"{self.num_samples} samples"
        return (
            f"The feature maps of {len(self.keys)} pictures were edited ({self.edit} the concept "
            f"{self.concepts.names[self.number]}), and reconstructed in {samples} each; all is measured on the "
            f"reconstructions. At strength {strength:g} the concept is reached by: {', '.join(reached)}; the edit "
            f"minus the random direction {cell(minus)}, p {shown_p(p)} (paired).{classified}{rank} 95 % intervals are "
            f"over pictures. {self.concepts.note}"
        ).rstrip()

    def sections(self) -> list[Section]:
        text = (
            "Pictures evenly spaced over the set, not selected: the picture, its plain reconstruction, and at strength "
            f"{self.strengths[self.step]:g} {', '.join(self.arms)}, from the same noise. Marked: another class than "
            "the picture's."
        )
        tests = (
            f"At strength {self.strengths[self.step]:g}, which changes maps most. p: of a paired permutation test, "
            "not corrected for the number of measures."
        )
        curves = [
            Section(
                LABELS[measure].capitalize(),
                EXPLAINED if measure == SCORE else "",
                plot=partial(self._plot, measure=measure),
            )
            for measure in self.unedited
        ]
        return [
            Section("Reconstructions", text, self.rows),
            *curves,
            Section("Paired tests", tests, table=self._table()),
        ]

    def _plot(self, axes: Axes, measure: str) -> None:
        found = {name: measures[measure] for name, measures in self.found.items()}
        values = {name: torch.tensor([float(one.values[0]) for one in several]) for name, several in found.items()}
        bands = {name: tuple(zip(*map(limits, several), strict=True)) for name, several in found.items()}
        plot_arms(axes, self.strengths, measure, values, float(self.plain[measure].values[0]), bands)

    def _table(self) -> list[list[str]]:
        minus = [head for name in self.controls for head in (f"edit minus {name}", "p")]
        rows = [["measure", "unedited", *self.arms, *minus]]
        for measure, plain in self.plain.items():
            values = [cell(found[measure][self.step]) for found in self.found.values()]
            tests = [one for found, p in self.tests[measure].values() for one in (cell(found), shown_p(p))]
            rows.append([LABELS[measure], cell(plain), *values, *tests])
        return rows

    def facts(self) -> dict[str, Any]:
        return {
            "concept": self.concepts.names[self.number],
            "edit": self.edit,
            "n": len(self.keys),
            "num_samples": self.num_samples,
            "strengths": self.strengths,
            "unedited": {measure: numbers(one) for measure, one in self.plain.items()},
            "edits": {
                arm: {measure: [numbers(one) for one in several] for measure, several in found.items()}
                for arm, found in self.found.items()
            },
            "spearman": float(np.mean(self.ranks)) if self.ranks else None,
            "tests": {
                measure: {name: {**numbers(one), "p": p} for name, (one, p) in found.items()}
                for measure, found in self.tests.items()
            },
            "tested_strength": self.strengths[self.step],
            "pictures": {
                key: {
                    arm: {one: values[row].tolist() for one, values in found.items()}
                    for arm, found in self.arms.items()
                }
                for row, key in enumerate(self.keys)
            },
        }


def steer_over(
    pipeline: FeatInvPipeline,
    pictures: Pictures,
    concepts: Concepts,
    concept: int,
    strengths: Sequence[float],
    edit: Edit = "add",
    mask: Tensor | None = None,
    classes: Sequence[int] = (),
    num_samples: int = 1,
    seed: int = 0,
) -> Steered:
    """Do what `steer` does to a set of pictures, given with their names; noise and random direction are each's own."""
    if len(pictures) < 2:
        raise UserError(f"`over`: intervals and tests need 2 pictures, and there is {len(pictures)}. Give more.")
    seen = [(name, classify(pipeline, [opened()])) for name, opened in pictures]
    shown = {*np.linspace(0, len(seen) - 1, min(SHOWN, len(seen))).round().astype(int).tolist()}
    arms: dict[str, dict[str, list[Values]]] = {}
    plain: dict[str, list[float]] = {}
    ranks: list[float] = []
    goals = torch.zeros(len(strengths))
    kept: list[tuple[Steering, str]] = []
    for number, (name, original) in enumerate(tqdm(seen, "steer", unit="picture")):
        one = steer_map(
            pipeline, original, concepts, concept, strengths, edit, mask, classes, num_samples, seed + number, True
        )
        for arm, measures in one.effects.items():
            for measure, values in measures.items():
                arms.setdefault(arm.partition(":")[0], {}).setdefault(measure, []).append(
                    values.mean(1).double().numpy()
                )
        for measure, values in one.unedited.items():
            plain.setdefault(measure, []).append(values.double().mean().item())
        goals += one.goals.abs()
        rank = rank_correlation(list(strengths), one.scores)
        ranks += [rank] if rank is not None else []
        if number in shown:
            kept.append((one, name))
    step = furthest(goals)
    return Steered(
        concepts, concept, edit, list(strengths), step, [name for name, _ in seen], num_samples,
        {arm: {measure: np.stack(values) for measure, values in found.items()} for arm, found in arms.items()},
        {measure: np.array(values) for measure, values in plain.items()}, ranks,
        [_row(one, name, step) for one, name in kept],
    )  # fmt: skip


def _row(steering: Steering, name: str, step: int) -> list[Tile]:
    """A picture, its plain reconstruction, and for the edit and each control the image at a step."""
    [picture], [expected] = steering.originals["images"], steering.originals["logits"]
    shown = {"unedited": (steering.plain["images"][0], steering.plain["logits"][0])}
    for arm, found in {EDIT: steering.found, **steering.controls}.items():
        shown[arm.partition(":")[0]] = found["images"][step, 0], found["logits"][step, 0]
    tiles = [tile(*one, arm, expected=expected) for arm, one in shown.items()]
    return [tile(picture, expected, name.rpartition("/")[2][-20:]), *tiles]
