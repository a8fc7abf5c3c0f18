"""Which images, and where in them, express each concept most."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from featinv_pl.explore.concepts import Concepts
from featinv_pl.explore.samples import Samples
from featinv_pl.pages.page import Report, Section, Tile
from featinv_pl.pages.pictures import overlay

BATCH = 256  # maps at a time


@dataclass(frozen=True)
class Example:
    """An image that expresses a concept.

    Attributes:
        picture: The image.
        heat: (h, w), how strongly each location expresses the concept, in units of strength.
        score: How strongly the whole image does.
        label: Of the image.
        source: Of the image.
    """

    picture: Image.Image
    heat: Tensor
    score: float
    label: int
    source: str


@dataclass(frozen=True)
class Gallery(Report):
    """For each concept the images that express it most, the strongest first.

    Attributes:
        concepts: The concepts.
        examples: For each its images.
    """

    name: ClassVar[str] = "examples"

    concepts: Concepts
    examples: list[list[Example]]

    @property
    def title(self) -> str:
        """See `Report`."""
        return f"Concepts of {self.concepts.origin['backbone']} ({self.concepts.method})"

    @property
    def lead(self) -> str:
        """See `Report`."""
        origin = self.concepts.origin
        scores = "".join(f" {name}: {value:.3f}." for name, value in self.concepts.scores.items())
        what = {
            "nmf": "Parts of which the feature vectors at all locations are sums; the share of their energy that is",
            "difference": "Directions from the mean map of one group of images to that of another.",
            "cav": "Normals of the planes that separate two groups of images; cross-validated accuracy,",
        }[self.concepts.method]
        shape = "x".join(map(str, origin["feature_shape"]))
        return f"{what}{scores} Layer {origin['layer']}, maps of {shape}."

    def sections(self) -> list[Section]:
        """See `Report`."""
        return [
            Section(
                f"{number}: {name}",
                rows=[
                    [Tile(one.picture, f"score {one.score:.2f}\nlabel {one.label}") for one in examples],
                    [Tile(overlay(one.picture, one.heat / hottest), "where") for one in examples],
                ],
            )
            for number, (name, examples) in enumerate(zip(self.concepts.names, self.examples, strict=True))
            if (hottest := max(one.heat.abs().max().item() for one in examples))
        ]

    def facts(self) -> dict[str, Any]:
        """See `Report`."""
        return {
            name: [
                {
                    "score": example.score,
                    "label": example.label,
                    "source": example.source,
                    "heat": example.heat.tolist(),
                }
                for example in examples
            ]
            for name, examples in zip(self.concepts.names, self.examples, strict=True)
        }


def gallery(concepts: Concepts, samples: Samples, num_examples: int = 8) -> Gallery:
    """Find the images that express each concept most.

    Args:
        concepts: The concepts.
        samples: Feature maps of the images.
        num_examples: For each concept.
    """
    everywhere = torch.ones(samples.features.shape[-2:])
    batches = [maps.float() for maps in samples.features.split(BATCH)]
    heat = torch.cat([concepts.activations(maps) for maps in batches])
    score = torch.cat([concepts.score(maps, everywhere) for maps in batches])
    best = score.argsort(dim=0, descending=True)[:num_examples]
    return Gallery(
        concepts,
        [
            [
                Example(
                    samples.picture(index),
                    heat[index, number],
                    score[index, number].item(),
                    int(samples.labels[index]),
                    samples.sets[samples.groups[index]].source,
                )
                for index in best[:, number].tolist()
            ]
            for number in range(len(concepts.names))
        ],
    )
