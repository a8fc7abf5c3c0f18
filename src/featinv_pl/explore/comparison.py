"""Comparison: pictures beside their reconstructions by several inverters, the first figure of the paper."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.explore.reconstruct import reconstruct_maps
from featinv_pl.inverter.pipeline import FeatInvPipeline, as_picture
from featinv_pl.pages.page import Report, Section, Tile
from featinv_pl.pages.pictures import listed_classes, prediction, top_classes
from featinv_pl.types import predicted

SIDE = 512  # pixels of a picture at most


@dataclass(frozen=True)
class Reconstructions:
    """One inverter's reconstructions of all pictures, in the pictures' order.

    Attributes:
        model: Its name.
        images: (P, 3, H, W) in [-1, 1], as bytes would hold them.
        cosines: (P), with the pictures' maps, averaged over locations.
        before: (P, K), logits of the pictures.
        after: (P, K), logits of the images.
    """

    model: str
    images: Tensor
    cosines: Tensor
    before: Tensor
    after: Tensor

    def tile(self, number: int) -> Tile:
        """The reconstruction of a picture, flagged where its class is another."""
        before, after = self.before[number], self.after[number]
        caption = f"{self.model}\ncosine {self.cosines[number]:.3f}\n{prediction(before)} → {prediction(after)}"
        return Tile(as_picture(self.images[number]), caption, int(predicted(before)) != int(predicted(after)))


@dataclass(frozen=True)
class Comparison(Report):
    """Pictures, and their reconstructions by several inverters."""

    name: ClassVar[str] = "comparison"

    names: list[str]
    pictures: list[Image.Image]
    models: list[Reconstructions]

    @property
    def title(self) -> str:
        return "Comparison of inverters"

    @property
    def lead(self) -> str:
        return (
            "Each picture beside its reconstruction by each inverter, from the feature map of the inverter's own "
            "classifier. Below an image its inverter, the cosine of the two maps, and the class predicted before and "
            "after, in red where they differ."
        )

    def sections(self) -> list[Section]:
        rows = [
            [Tile(picture, name), *(model.tile(number) for model in self.models)]
            for number, (name, picture) in enumerate(zip(self.names, self.pictures, strict=True))
        ]
        table = [
            [name, model.model, listed_classes(model.before[number]), listed_classes(model.after[number])]
            for number, name in enumerate(self.names)
            for model in self.models
        ]
        return [
            Section("Reconstructions", rows=rows),
            Section("The five most likely classes", table=[["picture", "model", "before", "after"], *table]),
        ]

    def facts(self) -> dict[str, Any]:
        return {
            name: {
                model.model: {
                    "cosine": model.cosines[number].item(),
                    "before": top_classes(model.before[number]),
                    "after": top_classes(model.after[number]),
                }
                for model in self.models
            }
            for number, name in enumerate(self.names)
        }


def compare(
    models: Iterable[tuple[str, FeatInvPipeline]], names: Sequence[str], pictures: Sequence[Image.Image], seed: int = 0
) -> Comparison:
    """Reconstruct pictures by several inverters, which are taken one after another: one at a time is in memory."""
    found = []
    for name, pipeline in models:
        before = pipeline.classify(pipeline.crop(pictures))
        after = reconstruct_maps(pipeline, before["features"], seed=seed)
        cosines = cosine_similarity(after["features"][:, 0], before["features"].cpu()).mean((1, 2))
        images, logits = after["images"][:, 0], after["logits"][:, 0]
        found.append(Reconstructions(name, images, cosines, before["logits"].cpu(), logits))
    return Comparison(list(names), [ImageOps.contain(picture, (SIDE, SIDE)) for picture in pictures], found)
