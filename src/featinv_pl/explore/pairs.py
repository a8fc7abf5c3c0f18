"""Two pictures: the maps between theirs, and a region of one in the other, reconstructed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

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
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.inverter.pipeline import FeatInvPipeline
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

Mode = Literal["linear", "slerp"]
LOW, HIGH = 0.01, 0.99  # quantiles: the range of cosines between real images
NAMES = ("composed", "first", "second")  # of the maps


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Turn the vector at each location from the first map's to the second's, and change its norm evenly.

    The spherical interpolation of Shoemake (Animating Rotation with Quaternion Curves, 1985) along the channels.
    Opposite or equal directions go straight.
    """
    one, two = first.double(), second.double()  # the angle between similar vectors loses half the digits
    norms = [vectors.norm(dim=-3, keepdim=True) for vectors in (one, two)]
    start, end = normalize(one, dim=-3), normalize(two, dim=-3)
    angle = (start * end).sum(dim=-3, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    turned = (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / sine
    straight = (sine < 1e-6) | (norms[0] == 0) | (norms[1] == 0)
    lengths = torch.lerp(norms[0], norms[1], share)
    return torch.where(straight, torch.lerp(one, two, share), turned * lengths).to(first.dtype)


@dataclass(frozen=True)
class Interpolation(Exploration):
    """Reconstructions of the maps between those of two pictures."""

    name, title = "interpolation", "Interpolation"

    mode: Mode
    shares: list[float]  # (S) of the second map, from 0 to 1
    nearest: list[float] | None = None  # (S), cosines of the images' maps with that of the most similar real image
    real: tuple[float, float] | None = None  # the range of that cosine among the real images themselves

    @cached_property
    def cosines(self) -> Tensor:
        """(S, 2), of the images' maps with those of the two pictures."""
        return _similarities(self.found["features"][:, 0], self.originals["features"])

    @property
    def flags(self) -> list[bool]:
        """For each step whether it is further from every real image than these are from each other."""
        if self.nearest is None or self.real is None:
            return [False] * len(self.shares)
        return [cosine < self.real[0] for cosine in self.nearest]

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
        text += f" The real images' cosines to the most similar other one lie between {low} and {high} (98 %);"
        return f"{text} {sum(self.flags)} steps lie below, in red."

    def sections(self) -> list[Section]:
        pictures = zip(self.originals["images"], self.originals["logits"], ("first", "second"), strict=True)
        images, logits = self.found["images"][:, 0], self.found["logits"][:, 0]
        steps = [
            Tile(as_picture(image), f"{share:.2f}\ncosine {first:.2f}, {second:.2f}\nclass {prediction(one)}", flag)
            for share, image, (first, second), one, flag in zip(
                self.shares, images, self.cosines.tolist(), logits, self.flags, strict=True
            )
        ]
        text = "Below each image the share of the second map, the cosines with both, and the predicted class."
        return [
            Section("The two pictures", rows=[[tile(*one) for one in pictures]]),
            Section("Reconstructions", text, [steps]),
            Section("Cosines with the feature maps", plot=self._plot_cosines),
            Section("Probabilities of the pictures' classes", plot=self._plot_classes),
        ]

    def _plot_cosines(self, axes: Axes) -> None:
        axes.plot(self.shares, self.cosines.numpy(), marker=".", label=["first", "second"])
        if self.nearest is not None and self.real is not None:
            axes.plot(self.shares, self.nearest, marker=".", color="grey", label="most similar real image")
            axes.axhspan(*self.real, color="grey", alpha=0.2, linewidth=0, label="among real images")
            axes.plot(self.shares, self.nearest, "o", markevery=self.flags, color=RED)
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
            "steps": [
                {
                    "share": share,
                    "cosines": self.cosines[step].tolist(),
                    "nearest": self.nearest[step] if self.nearest else None,
                    "flagged": self.flags[step] if self.real else None,
                    "prediction": prediction(self.found["logits"][step, 0]),
                }
                for step, share in enumerate(self.shares)
            ],
        }


def interpolate(
    pipeline: FeatInvPipeline,
    first: Image.Image,
    second: Image.Image,
    steps: int = 11,
    mode: Mode = "linear",
    real: Samples | None = None,
    seed: int = 0,
) -> Interpolation:
    """Reconstruct `steps` maps between those of two pictures, ends included, all from the same noise."""
    if real is not None:
        refuse_other_backbone(real.origin, pipeline, "`real`")
    ends = classify(pipeline, [first, second])
    shares = torch.linspace(0, 1, steps).tolist()
    one, other = ends["features"]
    between = slerp if mode == "slerp" else torch.lerp
    found = reconstruct_maps(pipeline, [between(one, other, share) for share in shares], seed=seed)
    if real is None:
        return Interpolation(ends, found, mode, shares)
    nearest = _similarities(found["features"][:, 0], real.features).amax(1).tolist()
    among = _similarities(real.features, real.features).fill_diagonal_(-torch.inf).amax(1)
    low, high = among.quantile(torch.tensor([LOW, HIGH])).tolist()
    return Interpolation(ends, found, mode, shares, nearest, (low, high))


def _similarities(features: Tensor, others: Tensor) -> Tensor:
    """Cosines (B, n) of maps (B, C, h, w) with maps (n, C, h, w), averaged over locations."""
    one, two = (normalize(maps.float()).flatten(1) for maps in (features, others))
    return one @ two.T / features[0, 0].numel()


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
