"""Composition: a region of one picture's map pasted into another's, and reconstructed."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.explore.edits import Box, box_mask, location_weights, paste
from featinv_pl.explore.reconstruct import reconstruct_maps, tile
from featinv_pl.inverter.pipeline import FeatInvPipeline, as_picture
from featinv_pl.pages.page import Report, Section, Tile
from featinv_pl.pages.pictures import listed_classes, overlay, prediction, top_classes


@dataclass(frozen=True)
class Composition(Report):
    """Reconstructions of a map with a region of another.

    Attributes:
        box: The region, in pixels of the classifier's crop.
        weight: (h, w), the share of each location that was pasted.
        originals: (2, 3, H, W): the picture, and the one that the region comes from.
        original_logits: (2, K).
        images: (n, 3, H, W) in [-1, 1], as bytes would hold them.
        logits: (n, K), measured on the images, as are the next.
        cosines: (n, 3, h, w) at each location with the composed map and with those of the two pictures.
    """

    name: ClassVar[str] = "composition"

    box: Box
    weight: Tensor
    originals: Tensor
    original_logits: Tensor
    images: Tensor
    logits: Tensor
    cosines: Tensor

    @property
    def inside(self) -> Tensor:
        """(n, 3), mean cosines within the region."""
        return (self.cosines * self.weight).sum((2, 3)) / self.weight.sum()

    @property
    def outside(self) -> Tensor:
        """(n, 3), mean cosines without; NaN if the region is everything."""
        return (self.cosines * (1 - self.weight)).sum((2, 3)) / (1 - self.weight).sum()

    @property
    def title(self) -> str:
        return "Composition"

    @property
    def lead(self) -> str:
        top, left, height, width = self.box
        return (
            f"The part of the second picture's feature map under the box of {height}x{width} pixels at row {top}, "
            f"column {left} was pasted into the first one's. Cosines and classes are measured on the reconstructions: "
            "with the composed map, and with the maps of the two pictures, inside the region and outside."
        )

    def sections(self) -> list[Section]:
        second = overlay(as_picture(self.originals[1]), self.weight)
        originals = [
            tile(self.originals[0], self.original_logits[0], "first"),
            Tile(second, f"second, pasted part\nclass {prediction(self.original_logits[1])}"),
        ]
        heats = [
            Tile(overlay(as_picture(image), 1 - cosines[0]), f"what is missing\ncosine {cosines[0].mean():.2f}")
            for image, cosines in zip(self.images, self.cosines, strict=True)
        ]
        samples = [
            tile(image, logits, "reconstruction") for image, logits in zip(self.images, self.logits, strict=True)
        ]
        cosines, classes = [["cosine with", "composed map", "first", "second"]], [["", "class (probability)"]]
        for name, logits in zip(("first", "second"), self.original_logits, strict=True):
            classes.append([name, listed_classes(logits)])
        for number, logits in enumerate(self.logits):
            classes.append([f"image {number}", listed_classes(logits)])
            for name, values in (("inside", self.inside[number]), ("outside", self.outside[number])):
                cosines.append([f"{name}, image {number}", *(f"{value:.3f}" for value in values.tolist())])
        text = "Bright: where the map of the reconstruction differs from the composed one."
        return [
            Section("The two pictures", rows=[originals]),
            Section("Reconstructions", text, [samples, heats]),
            Section("Cosines of the feature maps", table=cosines),
            Section("Most likely classes", table=classes),
        ]

    def facts(self) -> dict[str, Any]:
        return {
            "box": self.box,
            "predictions": [prediction(logits) for logits in self.original_logits],
            "images": [
                {
                    "classes": top_classes(logits),
                    "inside": _named(self.inside[number]),
                    "outside": _named(self.outside[number]),
                    "cosines": self.cosines[number, 0].tolist(),
                }
                for number, logits in enumerate(self.logits)
            ],
        }


def compose(
    pipeline: FeatInvPipeline, first: Image.Image, second: Image.Image, box: Box, num_samples: int = 1, seed: int = 0
) -> Composition:
    """Paste a region of the second picture's map into the first one's, and reconstruct it.

    The box is in pixels of the classifier's crop.

    Raises:
        UserError: The box reaches outside the image.
    """
    ends = pipeline.classify(pipeline.crop([first, second]))
    ours, theirs = ends["features"]
    mask = box_mask(box, (ends["images"].shape[-2], ends["images"].shape[-1]))
    weight = location_weights(mask, (ours.shape[-2], ours.shape[-1]))
    composed = paste(ours, theirs, weight.to(ours))
    found = reconstruct_maps(pipeline, [composed], num_samples, seed)
    cosines = [cosine_similarity(found["features"][0], one.cpu().unsqueeze(0)) for one in (composed, ours, theirs)]
    originals = ends["images"].cpu(), ends["logits"].cpu()
    return Composition(box, weight, *originals, found["images"][0], found["logits"][0], torch.stack(cosines, dim=1))


def _named(cosines: Tensor) -> dict[str, float | None]:
    """Cosines (3) by what they are with; None where there is nothing to compare."""
    names = ("composed", "first", "second")
    return {name: None if value != value else value for name, value in zip(names, cosines.tolist(), strict=True)}
