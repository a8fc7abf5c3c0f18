"""Two pictures: the maps between theirs, and a region of one in the other, reconstructed."""

from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.explore.exploration import (
    Box,
    Exploration,
    Samples,
    box_mask,
    classify,
    location_weights,
    reconstruct_maps,
    refuse_other_backbone,
    tile,
)
from featinv_pl.explore.paths import (
    BETWEEN,
    COLORS,
    FEATURES,
    LATENTS,
    PIXELS,
    Mode,
    Naturalness,
    control_paths,
    similarities,
)
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.backbone import Backbone
from featinv_pl.pages.page import (
    RED,
    Section,
    Tile,
    listed_classes,
    overlay,
    plot_probabilities,
    prediction,
    top_classes,
)
from featinv_pl.types import Observation

NATURAL = "The cosine with the most similar real image; grey: its range among the real images themselves."
ABOUT = {
    PIXELS: "The two pictures' pixels, mixed.",
    LATENTS: "Between the two pictures' latents of the prior's autoencoder, decoded.",
}
NAMES = ("composed", "first", "second")  # of the maps


@dataclass(frozen=True)
class Interpolation(Exploration):
    """Reconstructions of the maps between those of two pictures."""

    name, title = "interpolation", "Interpolation"

    mode: Mode
    shares: list[float]  # (S) of the second map, from 0 to 1
    controls: dict[str, Observation]  # as `found`, on the paths of pixels and latents
    nearest: dict[str, list[float]]  # by path (S), cosines with the most similar real image; none without real images
    real: tuple[float, float] | None  # the range of that cosine among the real images themselves
    judge: str | None  # the held-out classifier whose cosines these are

    @cached_property
    def cosines(self) -> Tensor:
        """(S, 2), of the images' maps with those of the two pictures."""
        return similarities(self.found["features"][:, 0], self.originals["features"])

    @property
    def paths(self) -> dict[str, Observation]:
        """What is seen on the path of feature maps, and on those of controls."""
        return {FEATURES: self.found, **self.controls}

    @property
    def flags(self) -> dict[str, list[bool]]:
        """By path, for each step, whether it is further from every real image than these are from each other."""
        low = -inf if self.real is None else self.real[0]
        return {path: [one < low for one in self.nearest.get(path, [inf] * len(self.shares))] for path in self.paths}

    @property
    def lead(self) -> str:
        first, second = (prediction(logits) for logits in self.originals["logits"])
        text = (
            f"From the feature map of a picture of class {first} to that of one of class {second} in "
            f"{len(self.shares)} steps ({self.mode}), each reconstructed from the same noise. Cosines and classes are "
            "measured on the reconstructions."
        )
        if self.real is None:
            return f"{text} No step is flagged, for lack of real images to compare with (`real`)."
        low, high = (f"{limit:.3f}" for limit in self.real)
        reader = f"the held-out classifier {self.judge}" if self.judge else "the classifier that is inverted"
        middle = ", ".join(
            f"{path} {values[len(values) // 2]:.3f} ({sum(self.flags[path])} of {len(values)} steps below)"
            for path, values in self.nearest.items()
        )
        text += (
            f" By {reader}, the real images' cosines to the most similar other one lie between {low} and {high} (98 %)"
        )
        return f"{text}; those of the steps in the middle are: {middle}. Steps below are marked."

    def sections(self) -> list[Section]:
        pictures = zip(self.originals["images"], self.originals["logits"], ("first", "second"), strict=True)
        text = "Below each image the share of the second map, the cosines with both, and the predicted class."
        plots = [Section("Cosines with the feature maps", plot=self._plot_cosines)]
        if self.real is not None:
            plots.insert(0, Section("How natural each step is", NATURAL, plot=self._plot_nearest))
        return [
            Section("The two pictures", rows=[[tile(*one) for one in pictures]]),
            Section("Reconstructions", text, [self._steps(FEATURES)]),
            *(Section(f"Control: path of {path}", ABOUT[path], [self._steps(path)]) for path in self.controls),
            *plots,
            Section("Probabilities of the pictures' classes", plot=self._plot_classes),
        ]

    def _steps(self, path: str) -> list[Tile]:
        seen, flags = self.paths[path], self.flags[path]
        cosines = similarities(seen["features"][:, 0], self.originals["features"]).tolist()
        steps = zip(self.shares, seen["images"][:, 0], cosines, seen["logits"][:, 0], flags, strict=True)
        return [
            Tile(as_picture(image), f"{share:.2f}\ncosine {first:.2f}, {second:.2f}\nclass {prediction(one)}", flag)
            for share, image, (first, second), one, flag in steps
        ]

    def _plot_nearest(self, axes: Axes) -> None:
        assert self.real is not None
        axes.axhspan(*self.real, color="grey", alpha=0.2, linewidth=0, label="among real images")
        for path, values in self.nearest.items():
            axes.plot(self.shares, values, marker=".", color=COLORS[path], label=path)
            axes.plot(self.shares, values, "o", markevery=self.flags[path], color=RED)
        axes.set(xlabel="share of the second picture", ylabel="cosine with the most similar real image")
        axes.legend(fontsize="small")

    def _plot_cosines(self, axes: Axes) -> None:
        axes.plot(self.shares, self.cosines.numpy(), marker=".", label=["first", "second"])
        axes.set(xlabel="share of the second map", ylabel="cosine")
        axes.legend(fontsize="small")

    def _plot_classes(self, axes: Axes) -> None:
        probabilities = self.found["logits"][:, 0].float().softmax(1)
        ends = self.originals["logits"] if probabilities.shape[1] else ()
        lines = {prediction(logits): probabilities[:, logits.argmax()] for logits in ends}
        plot_probabilities(axes, self.shares, lines, "share of the second map")

    def facts(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "predictions": [prediction(logits) for logits in self.originals["logits"]],
            "real": self.real,
            "judge": self.judge,
            "steps": self._facts(FEATURES),
            "controls": {path: self._facts(path) for path in self.controls},
        }

    def _facts(self, path: str) -> list[dict[str, Any]]:
        seen, nearest, flags = self.paths[path], self.nearest.get(path), self.flags[path]
        cosines = similarities(seen["features"][:, 0], self.originals["features"]).tolist()
        return [
            {
                "share": share,
                "cosines": cosines[step],
                "nearest": nearest[step] if nearest else None,
                "flagged": flags[step] if nearest else None,
                "prediction": prediction(seen["logits"][step, 0]),
            }
            for step, share in enumerate(self.shares)
        ]


def interpolate(
    pipeline: FeatInvPipeline,
    first: Image.Image,
    second: Image.Image,
    steps: int = 11,
    mode: Mode = "linear",
    real: Samples | None = None,
    seed: int = 0,
    judge: Backbone | None = None,
    controls: bool = True,
) -> Interpolation:
    """Reconstruct the maps between those of two pictures, ends included, from the same noise.

    With `controls`, the ways between the pictures' pixels and between their latents are shown, too. With `real`, it is
    measured how natural each step is: by the held-out classifier `judge`, else by the classifier that is inverted,
    which favours its own features.
    """
    if real is not None:
        refuse_other_backbone(real.origin, pipeline, "`real`")
    natural = None if real is None else Naturalness(real, judge)
    return interpolate_between(pipeline, classify(pipeline, [first, second]), steps, mode, natural, seed, controls)


def interpolate_between(
    pipeline: FeatInvPipeline,
    ends: Observation,
    steps: int,
    mode: Mode,
    natural: Naturalness | None,
    seed: int,
    controls: bool = True,
) -> Interpolation:
    """Do what `interpolate` does, for two pictures that `classify` has classified."""
    shares = torch.linspace(0, 1, steps).tolist()
    one, two = ends["features"]
    found = reconstruct_maps(pipeline, [BETWEEN[mode](one, two, share) for share in shares], seed=seed)
    others = control_paths(pipeline, ends["images"], shares, mode) if controls else {}
    if natural is None:
        return Interpolation(ends, found, mode, shares, others, {}, None, None)
    nearest = {path: natural(seen) for path, seen in {FEATURES: found, **others}.items()}
    title = natural.judge.title if natural.judge else None
    return Interpolation(ends, found, mode, shares, others, nearest, natural.limits, title)


@dataclass(frozen=True)
class Composition(Exploration):
    """Reconstructions of the first picture's map with a region of the second one's."""

    name, title = "composition", "Composition"

    maps: Tensor  # (3, C, h, w), the composed map and those of the two pictures
    box: Box  # the region, in pixels of the classifier's crop
    weight: Tensor  # (h, w), the share of each location that was pasted

    @cached_property
    def cosines(self) -> Tensor:
        """(n, 3, h, w), of the reconstructions' maps with the three maps at each location."""
        return cosine_similarity(self.found["features"][0].unsqueeze(1), self.maps.unsqueeze(0), dim=2)

    @property
    def means(self) -> dict[str, Tensor]:
        """(n, 3), mean cosines inside the region and outside; NaN outside if the region is everything."""
        weights = {"inside": self.weight, "outside": 1 - self.weight}
        return {name: (self.cosines * weight).sum((2, 3)) / weight.sum() for name, weight in weights.items()}

    @property
    def lead(self) -> str:
        top, left, height, width = self.box
        return (
            f"The part of the second picture's feature map under the box of {height}x{width} pixels at row {top}, "
            f"column {left} was pasted into the first one's. Cosines and classes are measured on the reconstructions: "
            "with the composed map, and with the maps of the two pictures, inside the region and outside."
        )

    def sections(self) -> list[Section]:
        pictures, (first, second) = self.originals["images"], self.originals["logits"]
        pasted = overlay(as_picture(pictures[1]), self.weight)
        originals = [
            tile(pictures[0], first, "first"),
            Tile(pasted, f"second, pasted part\nclass {prediction(second)}"),
        ]
        images, [logits] = self.found["images"][0], self.found["logits"]
        samples = [tile(*sample, "reconstruction") for sample in zip(images, logits, strict=True)]
        heats = [
            Tile(overlay(as_picture(image), 1 - cosines[0]), f"what is missing\ncosine {cosines[0].mean():.2f}")
            for image, cosines in zip(images, self.cosines, strict=True)
        ]
        cosines = [
            [f"{where}, image {number}", *(f"{value:.3f}" for value in values[number].tolist())]
            for number in range(len(images))
            for where, values in self.means.items()
        ]
        classes = [["first", listed_classes(first)], ["second", listed_classes(second)]]
        classes += [[f"image {number}", listed_classes(one)] for number, one in enumerate(logits)]
        text = "Bright: where the map of the reconstruction differs from the composed one."
        return [
            Section("The two pictures", rows=[originals]),
            Section("Reconstructions", text, [samples, heats]),
            Section("Cosines of the feature maps", table=[["cosine with", *NAMES], *cosines]),
            Section("Most likely classes", table=[["", "class (probability)"], *classes]),
        ]

    def facts(self) -> dict[str, Any]:
        return {
            "box": self.box,
            "predictions": [prediction(logits) for logits in self.originals["logits"]],
            "images": [
                {
                    "classes": top_classes(logits),
                    **{where: _named(values[number]) for where, values in self.means.items()},
                    "cosines": self.cosines[number, 0].tolist(),
                }
                for number, logits in enumerate(self.found["logits"][0])
            ],
        }


def compose(
    pipeline: FeatInvPipeline, first: Image.Image, second: Image.Image, box: Box, num_samples: int = 1, seed: int = 0
) -> Composition:
    """Paste the part of the second picture's map under a box, in pixels of the crop, into the first; reconstruct it."""
    ends = classify(pipeline, [first, second])
    ours, theirs = ends["features"]
    weight = location_weights(box_mask(box, pipeline.inverter.classifier.input_size), ours)
    composed = torch.lerp(ours, theirs, weight)
    found = reconstruct_maps(pipeline, [composed], num_samples, seed)
    return Composition(ends, found, torch.stack([composed, ours, theirs]), box, weight)


def _named(cosines: Tensor) -> dict[str, float | None]:
    """Cosines (3) by what they are with; None where there is nothing to compare."""
    return {name: None if value != value else value for name, value in zip(NAMES, cosines.tolist(), strict=True)}
