"""The images that express concepts most, and where."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from featinv_pl.explore.concepts import BATCH, Concepts
from featinv_pl.explore.exploration import Samples
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.pages.page import Report, Section, Tile, class_name, overlay

LEADS = {
    "nmf": "Parts of which the feature vectors at all locations are sums",
    "difference": "Directions from the mean map of one group of images to that of another",
    "cav": "Vectors, such as normals of the planes that separate two groups of images",
    "sae": "Features of a sparse autoencoder, each a part of the feature vectors at all locations",
}
MEANING = {"nmf": "the share of their energy that is", "cav": "cross-validated accuracy,"}  # of scores
SHOWN = 64  # concepts, of a file of more the first


class Example(NamedTuple):
    """An image that expresses a concept: each location by its heat (h, w), all of it by its score."""

    picture: Image.Image
    heat: Tensor
    score: float
    label: int
    label_name: str
    source: str


@dataclass(frozen=True)
class Gallery(Report):
    """For each concept the images that express it most, the strongest first."""

    name = "examples"

    concepts: Concepts
    examples: list[list[Example]]

    @property
    def title(self) -> str:
        return f"Concepts of a classifier ({self.concepts.method})"

    @property
    def lead(self) -> str:
        scores = "".join(f" {name}: {value:.3f}." for name, value in self.concepts.scores.items())
        meaning = f"; {MEANING[self.concepts.method]}{scores}" if scores else "."
        more = "For each, the images that express it most, and where in them."
        return f"{LEADS[self.concepts.method]}{meaning} {more}"

    @property
    def about(self) -> dict[str, str]:
        origin = self.concepts.origin
        shape = "x".join(map(str, origin["feature_shape"]))
        return {"classifier": f"`{origin['backbone']}`, layer {origin['layer']}, maps of {shape}"}

    def sections(self) -> list[Section]:
        sections = []
        for number, (name, examples) in enumerate(zip(self.concepts.names, self.examples, strict=False)):
            if hottest := max(one.heat.abs().max().item() for one in examples):
                images = [Tile(one.picture, f"score {one.score:.2f}\nlabel {one.label_name}") for one in examples]
                heats = [Tile(overlay(one.picture, one.heat / hottest), "bright: where") for one in examples]
                sections.append(Section(f"Concept {number}: {name}", rows=[images, heats]))
        return sections

    def facts(self) -> dict[str, Any]:
        return {
            name: [
                {"score": one.score, "label": one.label, "source": one.source, "heat": one.heat.tolist()}
                for one in examples
            ]
            for name, examples in zip(self.concepts.names, self.examples, strict=False)
        }


def gallery(concepts: Concepts, samples: Samples, num_examples: int = 8) -> Gallery:
    """Find the images that express each concept most."""
    everywhere = torch.ones(samples.features.shape[-2:])
    batches = [maps.float() for maps in samples.features.split(BATCH)]
    heat = torch.cat([concepts.activations(maps) for maps in batches])
    score = torch.cat([concepts.score(maps, everywhere) for maps in batches])
    best = score.argsort(dim=0, descending=True)[:num_examples]

    def example(index: int, concept: int) -> Example:
        label, (shards, number) = int(samples.labels[index]), samples.places[index]
        sample = shards[number]
        name = class_name(label, len(sample["logits"])) if label >= 0 else "unknown"
        shown = as_picture(sample["images"]), heat[index, concept], score[index, concept].item()
        return Example(*shown, label, name, shards.source)

    numbers = range(min(len(concepts.names), SHOWN))
    return Gallery(concepts, [[example(index, number) for index in best[:, number].tolist()] for number in numbers])
