"""Composition: a region of one picture's map pasted into another's, and what becomes of it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.explore.drawing import reconstruct_all
from featinv_pl.explore.edits import Box, box_mask, location_weights, paste
from featinv_pl.inverter.pipeline import FeatInvPipeline, as_picture
from featinv_pl.pages.page import Report, Section, Tile
from featinv_pl.pages.pictures import overlay, prediction, top_classes


@dataclass(frozen=True)
class Composition(Report):
    """What was drawn from a map with a region of another.

    Attributes:
        box: Where, in pixels of the picture as the classifier sees it.
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
        """See `Report`."""
        return "Composition"

    @property
    def lead(self) -> str:
        """See `Report`."""
        top, left, height, width = self.box
        return (
            f"The part of the second picture's feature map under the box of {height}x{width} pixels at row {top}, "
            f"column {left} was pasted into the first one's. Cosines and classes are measured on the images that were "
            "drawn: with the composed map, and with the maps of the two pictures, inside the region and outside."
        )

    def sections(self) -> list[Section]:
        """See `Report`."""
        first, second = (as_picture(picture) for picture in self.originals)
        tiles = [
            Tile(first, f"first\nclass {prediction(self.original_logits[0])}"),
            Tile(overlay(second, self.weight), f"second, pasted part\nclass {prediction(self.original_logits[1])}"),
        ]
        drawn = [as_picture(image) for image in self.images]
        captions = [f"drawn\nclass {prediction(logits)}" for logits in self.logits]
        wanted = self.cosines[:, 0].mean((1, 2)).tolist()
        heats = [
            Tile(overlay(picture, 1 - cosines[0]), f"what is missing\ncosine {cosine:.2f}")
            for picture, cosines, cosine in zip(drawn, self.cosines, wanted, strict=True)
        ]
        head = ["cosine with", "composed map", "first", "second"]
        table = [
            [f"{name}, image {number}", *(f"{value:.3f}" for value in values)]
            for number, parts in enumerate(zip(self.inside.tolist(), self.outside.tolist(), strict=True))
            for name, values in zip(("inside", "outside"), parts, strict=True)
        ]
        classes = [
            [name, ", ".join(f"{label} ({share:.2f})" for label, share in top_classes(logits).items())]
            for name, logits in (
                *zip(("first", "second"), self.original_logits, strict=True),
                *((f"image {number}", logits) for number, logits in enumerate(self.logits)),
            )
        ]
        text = "Bright: where the drawn image's map differs from the composed one."
        return [
            Section("The two pictures", rows=[tiles]),
            Section("What was drawn", text, [list(map(Tile, drawn, captions)), heats]),
            Section("Cosines of the feature maps", table=[head, *table]),
            Section("Most likely classes", table=[["", "class (probability)"], *classes]),
        ]

    def facts(self) -> dict[str, Any]:
        """See `Report`."""
        return {
            "box": self.box,
            "predictions": [prediction(logits) for logits in self.original_logits],
            "images": [
                {
                    "classes": top_classes(logits),
                    "inside": _named(inside),
                    "outside": _named(outside),
                    "cosines": cosines[0].tolist(),
                }
                for logits, inside, outside, cosines in zip(
                    self.logits, self.inside, self.outside, self.cosines, strict=True
                )
            ],
        }


def compose(
    pipeline: FeatInvPipeline, first: Image.Image, second: Image.Image, box: Box, num_samples: int = 1, seed: int = 0
) -> Composition:
    """Paste a region of the second picture's map into the first one's, and draw it.

    Args:
        pipeline: The inverter.
        first: A picture of any size.
        second: Another.
        box: The region, in pixels of the picture as the classifier sees it.
        num_samples: How many images.
        seed: Of the noise.

    Raises:
        UserError: The box reaches outside the image.
    """
    ends = pipeline.classify(pipeline.crop([first, second]))
    ours, theirs = ends["features"]
    mask = box_mask(box, (ends["images"].shape[-2], ends["images"].shape[-1]))
    weight = location_weights(mask, (ours.shape[-2], ours.shape[-1]))
    composed = paste(ours, theirs, weight.to(ours))
    drawn = reconstruct_all(pipeline, [composed], num_samples, seed)
    cosines = [cosine_similarity(drawn["features"][0], one.cpu().unsqueeze(0)) for one in (composed, ours, theirs)]
    return Composition(
        box,
        weight,
        ends["images"].cpu(),
        ends["logits"].cpu(),
        drawn["images"][0],
        drawn["logits"][0],
        torch.stack(cosines, dim=1),
    )


def _named(cosines: Tensor) -> dict[str, float | None]:
    """Cosines (3) by what they are with; None where there is nothing to compare."""
    names = ("composed", "first", "second")
    return {name: None if value != value else value for name, value in zip(names, cosines.tolist(), strict=True)}
