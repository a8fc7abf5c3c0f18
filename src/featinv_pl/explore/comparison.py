"""Comparison: pictures beside what several inverters draw from their maps, the first figure of the paper."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.explore.drawing import reconstruct_all
from featinv_pl.inverter.pipeline import FeatInvPipeline, as_picture
from featinv_pl.pages.page import Report, Section, Tile
from featinv_pl.pages.pictures import prediction, top_classes
from featinv_pl.types import predicted

SIDE = 512  # pixels of a picture at most


@dataclass(frozen=True)
class Drawn:
    """What one inverter drew from the maps of all pictures, in the pictures' order.

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


@dataclass(frozen=True)
class Comparison(Report):
    """Pictures, and what several inverters drew from their maps.

    Attributes:
        names: Of the pictures.
        pictures: The pictures.
        drawn: By each inverter.
    """

    name: ClassVar[str] = "comparison"

    names: list[str]
    pictures: list[Image.Image]
    drawn: list[Drawn]

    @property
    def title(self) -> str:
        """See `Report`."""
        return "Comparison of inverters"

    @property
    def lead(self) -> str:
        """See `Report`."""
        return (
            "Each picture beside what each inverter drew from the feature map of its own classifier. Below an image "
            "its inverter, the cosine of the two maps, and the class predicted before and after, in red where they "
            "differ."
        )

    def sections(self) -> list[Section]:
        """See `Report`."""
        rows = [
            [
                Tile(picture, name),
                *(
                    Tile(
                        as_picture(drawn.images[number]),
                        f"{drawn.model}\ncosine {drawn.cosines[number]:.3f}\n"
                        f"{prediction(drawn.before[number])} → {prediction(drawn.after[number])}",
                        int(predicted(drawn.before[number])) != int(predicted(drawn.after[number])),
                    )
                    for drawn in self.drawn
                ),
            ]
            for number, (name, picture) in enumerate(zip(self.names, self.pictures, strict=True))
        ]
        table = [
            [name, drawn.model, _listed(drawn.before[number]), _listed(drawn.after[number])]
            for number, name in enumerate(self.names)
            for drawn in self.drawn
        ]
        return [
            Section("What was drawn", rows=rows),
            Section("The five most likely classes", table=[["picture", "model", "before", "after"], *table]),
        ]

    def facts(self) -> dict[str, Any]:
        """See `Report`."""
        return {
            name: {
                drawn.model: {
                    "cosine": drawn.cosines[number].item(),
                    "before": top_classes(drawn.before[number]),
                    "after": top_classes(drawn.after[number]),
                }
                for drawn in self.drawn
            }
            for number, name in enumerate(self.names)
        }


def compare(
    models: Iterable[tuple[str, FeatInvPipeline]], names: Sequence[str], pictures: Sequence[Image.Image], seed: int = 0
) -> Comparison:
    """Draw pictures by several inverters.

    Args:
        models: Names and inverters, taken one after another, so that one at a time is in memory.
        names: Of the pictures.
        pictures: Of any size.
        seed: Of the noise.
    """
    drawn = []
    for name, pipeline in models:
        before = pipeline.classify(pipeline.crop(pictures))
        after = reconstruct_all(pipeline, before["features"], seed=seed)
        cosines = cosine_similarity(after["features"][:, 0], before["features"].cpu()).mean((1, 2))
        drawn.append(Drawn(name, after["images"][:, 0], cosines, before["logits"].cpu(), after["logits"][:, 0]))
    return Comparison(list(names), [ImageOps.contain(picture, (SIDE, SIDE)) for picture in pictures], drawn)


def _listed(logits: Tensor) -> str:
    return ", ".join(f"{name} ({share:.2f})" for name, share in top_classes(logits).items())
