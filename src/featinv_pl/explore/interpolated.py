"""Interpolation over many pairs of pictures: how natural the path of feature maps is, beside its controls."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from tqdm.auto import tqdm

from featinv_pl.errors import UserError
from featinv_pl.explore.exploration import Samples, classify, refuse_other_backbone
from featinv_pl.explore.pairs import NATURAL, Interpolation, interpolate_between
from featinv_pl.explore.paths import COLORS, FEATURES, Mode, Naturalness
from featinv_pl.explore.sets import Difference, Pictures, Values, cell, difference, limits, means, numbers, shown_p
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.metrics.estimates import Estimate
from featinv_pl.nets.backbone import Backbone
from featinv_pl.pages.page import Report, Section, Tile

SHOWN = 4  # pairs
MIDDLE, LOSS = "in the middle", "lost from the ends to the middle"


@dataclass(frozen=True)
class Interpolated(Report):
    """How natural the steps between the pictures of each pair are."""

    name = "interpolated"

    mode: Mode
    judge: str | None
    shares: list[float]  # S
    keys: list[str]  # n, of the pairs
    nearest: dict[str, Values]  # by path (n, S), cosines with the most similar real image
    real: tuple[float, float]
    pairs: list[Interpolation]  # that are shown

    @cached_property
    def measures(self) -> dict[str, dict[str, Values]]:
        """By measure and path (n,)."""
        middle = {path: values[:, len(self.shares) // 2] for path, values in self.nearest.items()}
        ends = {path: values[:, [0, -1]].mean(1) for path, values in self.nearest.items()}
        return {MIDDLE: middle, LOSS: {path: ends[path] - values for path, values in middle.items()}}

    @cached_property
    def found(self) -> dict[str, dict[str, Estimate]]:
        """The mean of each measure over pairs, by path."""
        return {
            measure: {path: means(self.keys, values[:, None], False)[0] for path, values in of_paths.items()}
            for measure, of_paths in self.measures.items()
        }

    @cached_property
    def tests(self) -> dict[str, dict[str, Difference]]:
        """By measure and control: features minus the control, pair by pair."""
        return {
            measure: {
                path: difference(self.keys, of_paths[FEATURES], values, False)
                for path, values in of_paths.items()
                if path != FEATURES
            }
            for measure, of_paths in self.measures.items()
        }

    @property
    def title(self) -> str:
        return f"Interpolation between {len(self.keys)} pairs"

    @property
    def lead(self) -> str:
        reader = f"the held-out classifier {self.judge}" if self.judge else "the classifier that is inverted"
        parts = [
            f" {measure.capitalize()}: {', '.join(f'{path} {cell(one)}' for path, one in of_paths.items())}."
            for measure, of_paths in self.found.items()
        ]
        low, high = self.real
        return (
            f"How natural the ways between the feature maps ({self.mode}), the pixels and the latents of "
            f"{len(self.keys)} pairs of pictures are: the cosine with the most similar real image, by {reader}, which "
            f"lies between {low:.3f} and {high:.3f} among the real images (98 %).{''.join(parts)} 95 % intervals are "
            "over pairs."
        )

    def sections(self) -> list[Section]:
        text = (
            "The ways of feature maps, pixels and latents, one below the other; pairs are evenly spaced, not selected."
        )
        rows = [self._row(pair, path) for pair in self.pairs for path in self.nearest]
        return [
            Section("Steps", text, rows),
            Section("How natural each step is", NATURAL, plot=self._plot),
            Section("Paired tests", "p: of a paired permutation test.", table=self._table()),
        ]

    def _row(self, pair: Interpolation, path: str) -> list[Tile]:
        steps = sorted(
            {0, len(self.shares) // 4, len(self.shares) // 2, 3 * len(self.shares) // 4, len(self.shares) - 1}
        )
        images, cosines, flags = pair.paths[path]["images"][:, 0], pair.nearest[path], pair.flags[path]
        return [
            Tile(as_picture(images[step]), f"{path} {self.shares[step]:.2f}\ncosine {cosines[step]:.2f}", flags[step])
            for step in steps
        ]

    def _plot(self, axes: Axes) -> None:
        axes.axhspan(*self.real, color="grey", alpha=0.2, linewidth=0, label="among real images")
        for path, values in self.nearest.items():
            found = means(self.keys, values, False)
            axes.plot(self.shares, [one.values[0] for one in found], marker=".", color=COLORS[path], label=path)
            low, high = zip(*map(limits, found), strict=True)
            axes.fill_between(self.shares, low, high, color=COLORS[path], alpha=0.15, linewidth=0)
        axes.set(xlabel="share of the second picture", ylabel="cosine with the most similar real image")
        axes.legend(fontsize="small")

    def _table(self) -> list[list[str]]:
        controls = [path for path in self.nearest if path != FEATURES]
        minus = [head for path in controls for head in (f"features minus {path}", "p")]
        rows = [["cosine", *self.nearest, *minus]]
        for measure, of_paths in self.found.items():
            tests = [text for one in self.tests[measure].values() for text in (cell(one.estimate), shown_p(one.p))]
            rows.append([measure, *map(cell, of_paths.values()), *tests])
        return rows

    def facts(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "judge": self.judge,
            "n": len(self.keys),
            "real": self.real,
            "shares": self.shares,
            "steps": {path: [numbers(one) for one in means(self.keys, v, False)] for path, v in self.nearest.items()},
            "means": {name: {path: numbers(one) for path, one in found.items()} for name, found in self.found.items()},
            "tests": {
                name: {path: {**numbers(one.estimate), "p": one.p} for path, one in found.items()}
                for name, found in self.tests.items()
            },
            "pairs": {
                key: {path: v[row].tolist() for path, v in self.nearest.items()} for row, key in enumerate(self.keys)
            },
        }


def interpolate_over(
    pipeline: FeatInvPipeline,
    pictures: Pictures,
    steps: int,
    mode: Mode,
    real: Samples,
    seed: int = 0,
    judge: Backbone | None = None,
) -> Interpolated:
    """Do what `interpolate` does to pairs of pictures: the first with the one half of the set later, and so on."""
    half = len(pictures) // 2
    if half < 2:
        raise UserError(
            f"`over`: {len(pictures)} pictures make {half} pairs, and intervals need 2. Give more pictures."
        )
    refuse_other_backbone(real.origin, pipeline, "`real`")
    natural = Naturalness(real, judge)
    shown = {*np.linspace(0, half - 1, min(SHOWN, half)).round().astype(int).tolist()}
    nearest: dict[str, list[list[float]]] = {}
    keys: list[str] = []
    kept: list[Interpolation] = []
    for number in tqdm(range(half), "interpolate", unit="pair"):
        (first, one), (second, two) = pictures[number], pictures[half + number]
        found = interpolate_between(pipeline, classify(pipeline, [one(), two()]), steps, mode, natural, seed + number)
        keys.append(f"{first} to {second}")
        for path, values in found.nearest.items():
            nearest.setdefault(path, []).append(values)
        kept += [found] if number in shown else []
    arrays: Mapping[str, Values] = {path: np.array(values) for path, values in nearest.items()}
    title = judge.title if judge else None
    return Interpolated(mode, title, found.shares, keys, dict(arrays), natural.limits, kept)
