"""Feature maps of real images, read from shard sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.data.shards.reader import ShardSet
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
    """Feature maps of real images.

    Attributes:
        features: (n, C, h, w), in half precision as they are stored.
        labels: (n,), as the classifier counts them; -1 where it has no such class.
        keys: Names, which begin with that of the class's folder where there is one.
        origin: What made them.
        sets: The shard sets.
        groups: For each sample the number of its set.
        numbers: And its place there.
    """

    features: Tensor
    labels: Tensor
    keys: list[str]
    origin: Origin
    sets: list[ShardSet]
    groups: list[int]
    numbers: list[int]

    def picture(self, index: int) -> Image.Image:
        """The image that a map was taken from."""
        return as_picture(self.sets[self.groups[index]][self.numbers[index]]["images"])

    def of_class(self, label: int | str) -> Tensor:
        """Which samples (n,) have a label, or lie in the class folder of that name.

        Raises:
            UserError: None of them.
        """
        known = sorted(set(self.labels.tolist()))
        if str(label).removeprefix("-").isdecimal() and int(label) in known:
            return self.labels == int(label)
        chosen = torch.tensor([key.startswith(f"{label}/") for key in self.keys])
        if not chosen.any():
            raise UserError(
                f"--between: no sample has the label {label}. There are {_range(known)}. "
                "Names of class folders work as well."
            )
        return chosen


def read_samples(folders: Sequence[Path], num_images: int, option: str) -> Samples:
    """Read shard sets of one backbone and layer.

    Args:
        folders: The sets.
        num_images: How many images of each set at most, evenly spaced over it.
        option: The option that named them, for errors.

    Raises:
        UserError: Sets of different backbones, or of none.
    """
    sets = [ShardSet(folder, folder.name, option) for folder in folders]
    origins = [_origin(shards) for shards in sets]
    for folder, shards, origin in zip(folders, sets, origins, strict=True):
        if origin != origins[0]:
            raise UserError(
                f"{option}: '{folders[0]}' holds maps of {_named(origins[0])}, and '{folder}' those of "
                f"{_named(origin)}. Give sets of one backbone and layer."
            )
        if not len(shards):
            raise UserError(f"{option}: the shard set '{folder}' has no samples. Extract features first.")
    features, labels, keys, groups, numbers = [], [], [], [], []
    for group, folder in enumerate(folders):
        reader = ShardSet(folder, folder.name, option, with_images=False)
        chosen = np.linspace(0, len(reader) - 1, min(num_images, len(reader))).round().astype(int).tolist()
        for sample in map(reader.stored, chosen):
            features.append(sample["features"])
            labels.append(sample["labels"])
            keys.append(sample["key"])
        groups += [group] * len(chosen)
        numbers += chosen
    return Samples(torch.stack(features), torch.tensor(labels), keys, origins[0], sets, groups, numbers)


def refuse_other_backbone(origin: Origin, pipeline: FeatInvPipeline, what: str) -> None:
    """Raise an error that names both sides if maps come from another backbone or layer than an inverter reads.

    Args:
        origin: Of the maps.
        pipeline: The inverter.
        what: The option and its value, for the error.
    """
    inverter = pipeline.inverter
    backbone = inverter.classifier
    ours = Origin(
        backbone=backbone.title,
        backbone_digest=inverter.digests["backbone"],
        layer=backbone.layer,
        feature_shape=list(backbone.feature_shape),
    )
    if any(origin[key] != ours[key] for key in ("backbone_digest", "layer", "feature_shape")):
        raise UserError(
            f"{what} belongs to {_named(origin)}, and --model reads {_named(ours)}. "
            "Give what was made with the backbone of the model."
        )


def _origin(shards: ShardSet) -> Origin:
    made_by = shards.manifest["provenance"]
    return Origin(
        backbone=made_by["backbone"],
        backbone_digest=made_by["backbone_digest"],
        layer=made_by["layer"],
        feature_shape=made_by["feature_shape"],
    )


def _named(origin: Origin) -> str:
    shape = "x".join(map(str, origin["feature_shape"]))
    return f"'{origin['backbone']}' (weights {origin['backbone_digest'][:8]}, layer {origin['layer']}, maps {shape})"


def _range(labels: list[int]) -> str:
    return (
        ", ".join(map(str, labels)) if len(labels) <= 20 else f"{len(labels)} labels from {labels[0]} to {labels[-1]}"
    )
