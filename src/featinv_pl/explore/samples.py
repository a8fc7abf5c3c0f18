"""Feature maps of real images, read from shard sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.data.shards.samples import Sample
from featinv_pl.errors import UserError
from featinv_pl.inverter.pipeline import FeatInvPipeline, as_picture

Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f]{0,500}$")]  # for it is printed


class Origin(TypedDict):
    """The backbone that feature maps come from, and its layer."""

    backbone: Line
    backbone_digest: Line
    layer: Line
    feature_shape: list[int]


@dataclass(frozen=True)
class Samples:
    """Feature maps of real images."""

    features: Tensor  # (n, C, h, w), in half precision as they are stored
    labels: Tensor  # (n,), as the classifier counts them; -1 where it has no such class
    keys: list[str]  # names, which begin with that of the class's folder where there is one
    origin: Origin
    places: list[tuple[ShardSet, int]]  # the shard set of each sample, and its number there

    def maps(self, pooled: bool = False) -> Tensor:
        """The maps in single precision, or their means over locations (n, C, 1, 1)."""
        maps = self.features.float()
        return maps.mean((2, 3), keepdim=True) if pooled else maps

    def picture(self, index: int) -> Image.Image:
        shards, number = self.places[index]
        return as_picture(shards[number]["images"])

    def of_class(self, label: int | str) -> Tensor:
        """A boolean for each sample (n,): whether it has a label, or lies in the class folder of that name."""
        known = sorted(set(self.labels.tolist()))
        if str(label).removeprefix("-").isdecimal() and int(label) in known:
            return self.labels == int(label)
        chosen = torch.tensor([key.startswith(f"{label}/") for key in self.keys])
        if not chosen.any():
            many = f"{len(known)} labels from {known[0]} to {known[-1]}"
            names = many if len(known) > 20 else ", ".join(map(str, known))
            raise UserError(
                f"`between`: no sample has the label {label}. There are {names}. Names of class folders work as well."
            )
        return chosen


def read_samples(folders: Sequence[Path], num_images: int, option: str) -> Samples:
    """Read at most `num_images` of each shard set, evenly spaced over it; errors begin with `option`."""
    sets = [ShardSet(folder, folder.name, option) for folder in folders]
    first, *_ = origins = [_origin(shards) for shards in sets]
    found: list[Sample] = []
    places = []
    for folder, origin, shards in zip(folders, origins, sets, strict=True):
        if origin != first:
            raise UserError(
                f"{option}: '{folders[0]}' holds maps of {_described(first)}, and '{folder}' those of "
                f"{_described(origin)}. Give sets of one backbone and layer."
            )
        if not len(shards):
            raise UserError(f"{option}: the shard set '{folder}' has no samples. Extract features first.")
        chosen = np.linspace(0, len(shards) - 1, min(num_images, len(shards))).round().astype(int).tolist()
        found += map(ShardSet(folder, folder.name, option, with_images=False).stored, chosen)
        places += [(shards, number) for number in chosen]
    features = torch.stack([sample["features"] for sample in found])
    labels = torch.tensor([sample["labels"] for sample in found])
    return Samples(features, labels, [sample["key"] for sample in found], first, places)


def refuse_other_backbone(origin: Origin, pipeline: FeatInvPipeline, name: str) -> None:
    """Raise an error if maps come from another backbone or layer than an inverter reads; `name` is the argument's."""
    classifier = pipeline.inverter.classifier
    ours = Origin(
        backbone=classifier.title,
        backbone_digest=pipeline.inverter.digests["backbone"],
        layer=classifier.layer,
        feature_shape=list(classifier.feature_shape),
    )
    if {**origin, "backbone": ""} != {**ours, "backbone": ""}:  # names of the same weights may differ
        raise UserError(
            f"{name} belongs to {_described(origin)}, and the model reads {_described(ours)}. "
            "Give what was made with the backbone of the model."
        )


def _origin(shards: ShardSet) -> Origin:
    made_by = cast(dict[str, Any], shards.manifest["provenance"])
    return cast(Origin, {name: made_by[name] for name in Origin.__annotations__})


def _described(origin: Origin) -> str:
    shape = "x".join(map(str, origin["feature_shape"]))
    return f"'{origin['backbone']}' (weights {origin['backbone_digest'][:8]}, layer {origin['layer']}, maps {shape})"
