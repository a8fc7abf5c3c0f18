"""The page of an audit: which samples are accepted, where these vary, and which properties a classifier ignores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite, nan
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from skimage.segmentation import mark_boundaries
from torch import Tensor

from featinv_pl.explore.variation import PARTS, PROPERTIES, Key, regions
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.metrics.estimates import Estimate, estimates
from featinv_pl.pages.page import Report, Section, Tile, overlay

Method = Literal["inverter", "refined", "training-free"]
MODEL = "the model's"  # classifier
SHOWN, SMALLEST = 8, 192  # images with their pictures on the page, and pixels of a picture with outlines
HARDLY = 0.1  # a rate of acceptance below which the page warns
FEWEST, REPLICATES = 5, 1000  # images that a bootstrap needs, and how often it resamples


@dataclass(frozen=True)
class Audited:
    """The samples of one picture's map, and what the accepted ones have in common; A of them were accepted."""

    name: str
    images: Tensor  # (2, 3, H, W): the picture, and its reconstruction by the autoencoder
    ceiling: float  # the cosine of this reconstruction's map with the picture's
    fidelity: float  # the cosine from which on samples are accepted
    cosines: dict[Method, Tensor]  # (n,), of all samples
    extremes: Tensor  # (2, 3, H, W): the accepted samples that differ most; of these, (A, 3, H, W) if A is below 2
    variance: Tensor  # (H, W), of pixels in [0, 1] of the accepted samples, averaged over colours; NaN if A is below 2
    variances: dict[Key, float]  # of what `deviations` tells apart
    opinions: dict[str, dict[str, Any]]  # what classifiers say of the accepted samples: see `_opinion`

    @property
    def accepted(self) -> int:
        return sum(int((cosines >= self.fidelity).sum()) for cosines in self.cosines.values())

    @property
    def distance(self) -> float:
        """The root mean square difference of the extremes, of pixels in [0, 1]; 0 of a single one."""
        return float((self.extremes[:1] - self.extremes[-1:]).square().mean().sqrt() / 2) if self.accepted else 0.0

    @cached_property
    def regions(self) -> tuple[Any, Any]:
        """As `variation.regions` returns them."""
        return regions(np.asarray(as_picture(self.images[0])), self.variance)

    def tiles(self) -> Iterator[Tile]:
        picture = as_picture(self.images[0])
        best = max(float(cosines.max()) for cosines in self.cosines.values())
        said = self.opinions.get(MODEL)
        yield Tile(
            picture, f"{self.name}\n" + (f"class {said['picture']}" if said else f"none accepted\nbest {best:.3f}")
        )
        yield Tile(as_picture(self.images[1]), f"autoencoder\ncosine {self.ceiling:.3f}")
        if self.accepted > 1:
            spread = self.variance.sqrt()
            yield Tile(
                overlay(picture, spread / spread.max().clamp(min=1e-6)),
                f"bright: samples vary\ndeviation to {spread.max():.3f}",
            )
            labels, shares = self.regions
            density = shares[:, 0] / shares[:, 1].clip(min=1e-12)
            heat = overlay(picture, torch.from_numpy(density / density.max().clip(min=1e-12))[labels])
            scale = max(1, SMALLEST // heat.width)  # for thin lines
            large = np.asarray(heat).repeat(scale, 0).repeat(scale, 1)
            outlined = mark_boundaries(large, labels.repeat(scale, 0).repeat(scale, 1), color=(1, 1, 1))
            varied, pixels = shares[density.argmax()]
            yield Tile(
                Image.fromarray((outlined * 255).astype(np.uint8)),
                f"by region: {varied:.0%} of the variance on {pixels:.0%} of the pixels",
            )
        classes = self.opinions.get(MODEL, {}).get("extremes", [])
        for number, (image, name) in enumerate(zip(self.extremes, classes, strict=True)):
            yield Tile(as_picture(image), f"accepted {number + 1}\nclass {name}")
        if self.accepted > 1:
            apart = (self.extremes[0] - self.extremes[1]).abs()
            shown = as_picture(apart / apart.max().clamp(min=1e-6) * 2 - 1)
            yield Tile(shown, f"their difference\nroot mean square {self.distance:.3f}")

    def facts(self) -> dict[str, Any]:
        shares = self.regions[1].tolist() if self.accepted > 1 else []
        return {
            "autoencoder_cosine": self.ceiling,
            "fidelity": self.fidelity,
            "accepted": self.accepted,
            "samples": {name: cosines.tolist() for name, cosines in self.cosines.items()},
            "difference_of_extremes": self.distance,
            "variance": _nested({key: _number(value) for key, value in self.variances.items()}),
            "regions": [{"variance": variance, "pixels": pixels} for variance, pixels in shares],
            "classifiers": self.opinions,
        }


@dataclass(frozen=True)
class Measure:
    """How much of a part of the variance, or of a property's, is left when the features are fixed."""

    open: Estimate  # the variance within images' accepted samples, divided by that of the prior's samples
    share: Estimate  # of the variance within images; of properties 1
    free: Estimate  # the same of the prior's samples

    def facts(self) -> dict[str, Any]:
        return {
            "open": _number(self.open.values[0]),
            "interval": _interval(self.open),
            "share": _number(self.share.values[0]),
            "share_interval": _interval(self.share),
            "share_of_the_prior": _number(self.free.values[0]),
            "images": self.open.count,
        }

    def row(self) -> list[str]:
        return [_said(self.open, 2), *(_said(one, 1, "%") for one in (self.share, self.free))]


@dataclass(frozen=True)
class Audit(Report):
    """Of several pictures what their accepted samples vary in, beside the prior's samples."""

    name, title = "audit", "Audit: what stays open when the features are fixed"

    images: list[Audited]
    prior: dict[Key, Tensor]  # squared deviations (n,) of samples of the bare prior, as `deviations` returns them

    @cached_property
    def measures(self) -> dict[Key, Measure]:
        names = [image.name for image in self.images]
        inside = _means(names, {key: [one.variances.get(key, nan) for one in self.images] for key in self.prior})
        outside = _means([f"prior {number}" for number in range(len(next(iter(self.prior.values()))))], self.prior)
        found = {}
        for key in self.prior:
            group = [key] if key[0] == PROPERTIES else [other for other in self.prior if other[0] == key[0]]
            shares = []
            for side in (inside, outside):
                whole = Estimate(np.sum([side[other].values for other in group], axis=0), side[key].count)
                shares.append(side[key] / whole)
            found[key] = Measure(replace(inside[key] / outside[key], count=inside[key].count), *shares)
        return found

    def _cosines(self, method: Method) -> Tensor:
        return torch.cat([image.cosines[method] for image in self.images])

    @property
    def acceptance(self) -> dict[Method, dict[str, float]]:
        """Of each method the share of samples that were accepted, the best cosine, and what a tenth reach."""
        return {
            method: {
                "accepted": sum(float((one.cosines[method] >= one.fidelity).sum()) for one in self.images)
                / len(cosines),
                "best": cosines.max().item(),
                "tenth": cosines.quantile(0.9).item(),
            }
            for method in self.images[0].cosines
            for cosines in [self._cosines(method)]
        }

    @property
    def lead(self) -> str:
        total = sum(len(cosines) for one in self.images for cosines in one.cosines.values())
        accepted = sum(one.accepted for one in self.images)
        open_ = sum(one.accepted > 1 for one in self.images)
        asked, pictures = [one.fidelity for one in self.images], len(self.images)
        tenth = torch.cat([*map(self._cosines, self.images[0].cosines)]).quantile(0.9).item()
        text = (
            f"{accepted} of {total} samples ({accepted / total:.1%}) of {pictures} picture{'s' * (pictures > 1)} have "
            f"a map as close to the picture's as was asked for (cosine {min(asked):.3f} to {max(asked):.3f}). "
        )
        if accepted < HARDLY * total:
            text += (
                "Hardly any sample is accepted: the inverter does not reach that fidelity, so the page says little of "
                f"what the classifier leaves open. A fidelity of {tenth:.3f} would accept a tenth; the lower it is, "
                "the more of the variance is the inverter's infidelity, and not the classifier's invariance. "
            )
        elif any(one.fidelity < one.ceiling for one in self.images):
            reached = [one.ceiling for one in self.images]
            text += (
                f"The autoencoder's reconstructions reach {min(reached):.3f} to {max(reached):.3f}: below that, part "
                "of the variance is the inverter's infidelity. "
            )
        if not open_:
            return f"{text}No picture has two accepted samples, so nothing can be said of how they vary."
        known = {name: m.open.values[0] for (group, name), m in self.measures.items() if group == PROPERTIES}
        ordered = sorted((name for name in known if isfinite(known[name])), key=lambda name: -known[name])
        listed = ", ".join(f"{name} {known[name]:.2f}" for name in ordered)
        return (
            f"{text}The variance that properties have within the accepted samples of a picture, of which {open_} of "
            f"{pictures} have two or more, divided by that in images that vary freely under the prior: {listed}. 0 is "
            "fixed by the features, 1 ignored."
        )

    def sections(self) -> list[Section]:
        acceptance = [["method", "accepted", "best cosine", "cosine that a tenth reach"]]
        for method, one in self.acceptance.items():
            acceptance.append([method, f"{one['accepted']:.1%}", f"{one['best']:.3f}", f"{one['tenth']:.3f}"])
        shown = self.images[:SHOWN]
        text = (
            "Each picture, its reconstruction by the autoencoder alone, where the accepted samples vary (standard "
            "deviation of pixels in [0, 1]), the same by region, with the share of the variance and of the pixels of "
            "the brightest one, and the two accepted samples that differ most, though both maps are that close."
        )
        sections = [
            Section("Which samples are accepted", plot=self._plot_acceptance, table=acceptance),
            Section("Where the accepted samples vary", text, [list(image.tiles()) for image in shown]),
        ]
        if any(image.accepted > 1 for image in self.images):
            table = [["group", "part", "open", "share of the variance", "share under the prior"]]
            table += [[*key, *measure.row()] for key, measure in self.measures.items()]
            text = (
                "Open: the variance within the accepted samples of a picture, averaged over "
                f"{next(iter(self.measures.values())).open.count} pictures, divided by that of the prior's samples, "
                "which no feature map fixes. "
            )
            enough = "95 % intervals are of a bootstrap over pictures." if self._enough else ""
            text += enough or f"There are no intervals of fewer than {FEWEST} pictures."
            sections.append(Section("What the classifier ignores", text, plot=self._plot_properties))
            sections.append(Section("By frequency, colour and position", plot=self._plot_parts, table=table))
        rows = [
            [image.name, name, said["picture"], _classes(said), f"{said['cosine']:.3f}", f"{said['autoencoder']:.3f}"]
            for image in self.images
            for name, said in image.opinions.items()
        ]
        if rows:
            text = (
                "The class of the picture, those of the accepted samples, and the cosine of their maps with the "
                "picture's, beside that of the autoencoder's reconstruction."
            )
            header = ["picture", "classifier", "class", "of accepted samples", "cosine", "autoencoder"]
            sections.append(Section("What classifiers say of the accepted samples", text, table=[header, *rows]))
        return sections

    @property
    def _enough(self) -> bool:
        return sum(image.accepted > 1 for image in self.images) >= FEWEST

    def _plot_acceptance(self, axes: Axes) -> None:
        for method in self.images[0].cosines:
            values = torch.cat([image.cosines[method] - image.fidelity for image in self.images])
            axes.hist(values.numpy(), bins=40, alpha=0.6, label=method)
        axes.axvline(0, color="black", linewidth=1)
        axes.set(xlabel="cosine, less what was asked for (0: accepted)", ylabel="samples")
        axes.legend(fontsize="small")

    def _plot_properties(self, axes: Axes) -> None:
        self._bars(axes, [key for key in self.measures if key[0] == PROPERTIES])

    def _plot_parts(self, axes: Axes) -> None:
        self._bars(axes, [key for key in self.measures if key[0] in PARTS])

    def _bars(self, axes: Axes, keys: Sequence[Key]) -> None:
        for place, key in enumerate(reversed(keys)):
            measure = self.measures[key].open
            if isfinite(value := measure.values[0]):
                axes.plot(value, place, "o", color="tab:blue")
                if interval := _interval(measure):
                    axes.plot(interval, [place, place], "-", color="tab:blue")
        names = [name if group == PROPERTIES else f"{group} {name}" for group, name in reversed(keys)]
        axes.set_yticks(range(len(keys)), names, fontsize="x-small")
        axes.axvline(1, color="grey", linestyle=":")
        axes.set(xlabel="open (0: fixed, 1: as under the prior)")
        axes.set_xlim(left=0)

    def facts(self) -> dict[str, Any]:
        return {
            "acceptance": self.acceptance,
            "images": {image.name: image.facts() for image in self.images},
            "measures": _nested({key: measure.facts() for key, measure in self.measures.items()}),
        }


def _means(names: Sequence[str], values: Mapping[Key, Any]) -> dict[Key, Estimate]:
    """Means with their replicates over `names`, for each key of its finite values (len(names))."""
    table = np.stack([np.asarray(one, dtype=np.float64) for one in values.values()], axis=1)
    finite = np.isfinite(table)
    found = estimates(names, np.where(finite, table, 0), finite.astype(float), [False] * len(values), REPLICATES)
    return dict(zip(values, found, strict=True))


def _interval(one: Estimate) -> list[float] | None:
    """The 95 % interval over pictures; None of too few, and of what is not defined."""
    if (one.count or 0) < FEWEST or not isfinite(one.values[0]) or one.interval is None:
        return None
    return [*one.interval]


def _said(one: Estimate, digits: int, kind: str = "f") -> str:
    if not isfinite(one.values[0]):
        return "not defined"
    between = " to ".join(f"{limit:.{digits}{kind}}" for limit in _interval(one) or ())
    return f"{one.values[0]:.{digits}{kind}}" + (f" ({between})" if between else "")


def _classes(said: Mapping[str, Any]) -> str:
    shown = [f"{name} ({number})" for name, number in said["classes"].items()]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _number(value: float) -> float | None:
    return float(value) if isfinite(value) else None


def _nested(values: Mapping[Key, Any]) -> dict[str, dict[str, Any]]:
    groups = dict.fromkeys(group for group, _ in values)
    return {group: {name: one for (other, name), one in values.items() if other == group} for group in groups}
