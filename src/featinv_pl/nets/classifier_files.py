"""What the files of a classifier say: the names of its classes, and weights as training scripts leave them."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.nets.weights import read_weights

NO_LABEL = -1
IMAGENET = 1000
# What wraps a network while it trains: DataParallel, torch.compile, Lightning, the robustness library.
WRAPPERS = re.compile(r"^((module|_orig_mod|model|net|attacker|backbone)\.)+")
TRANSFORMERS = re.compile(r"\b(embeddings?|embedder)\.|\bencoder\.(layer|layers|stages)\.")  # names of that library


@dataclass(frozen=True)
class Classes:
    """The classes of a classifier.

    Attributes:
        labels: The place of each class among the logits, by name. Empty if the names are not known.
        numbered: Names that are numbers below it, such as the folders of ImageNet-V2, are labels themselves.
    """

    labels: dict[str, int]
    numbered: int

    @classmethod
    def of(cls, model: Any, num_classes: int) -> Self:
        """The classes of a timm model: `label_names` of its configuration, as fitting a `Classifier` writes them.

        Without them, they are the wnids that timm knows for ImageNet-1k, 12k, 21k and 22k, told by their number.
        """
        if names := model.pretrained_cfg.get("label_names"):
            labels = {name: label for label, name in enumerate(names)} if isinstance(names, list | tuple) else {}
            if len(labels) != num_classes or not all(isinstance(name, str) for name in labels):
                raise UserError(
                    f"`backbone`: label_names in config.json are not {num_classes} different names, one for each "
                    "class. Correct them, or fit the Classifier again."
                )
            return cls(labels, 0)
        subset = infer_imagenet_subset({"num_classes": num_classes})
        if subset is None or not model.num_classes:
            return cls({}, num_classes)
        return cls(_wnids(subset), num_classes if num_classes == IMAGENET else 0)

    def label(self, name: str) -> int:
        """The label of a class by its name; -1 for a name that is not among the classifier's."""
        if name.isdecimal() and int(name) < self.numbered:
            return int(name)
        return self.labels.get(name, NO_LABEL)


@cache
def _wnids(subset: str) -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(ImageNetInfo(subset).label_names())}


def read_classifier(path: Path) -> dict[str, Tensor]:
    """Read the state dict of the largest network in a file, without the prefixes of what has wrapped it."""
    networks: dict[str, dict[str, Tensor]] = {}
    for name, value in read_weights(path, "`weights`").items():
        rest = WRAPPERS.sub("", name)
        networks.setdefault(name.removesuffix(rest), {})[rest] = value
    chosen = max(networks, key=lambda prefix: len(networks[prefix]))
    for prefix, other in networks.items():
        same = other.keys() == networks[chosen].keys()
        if same and not all(torch.equal(value, networks[chosen][name]) for name, value in other.items()):
            raise UserError(
                f"`weights`: '{path}' holds two networks of the same names and other values, '{chosen}' and "
                f"'{prefix}'. Give a file with one of them."
            )
    return networks[chosen]


def misfit(weights: dict[str, Tensor], model: Any, name: str) -> str | None:
    """Why weights do not fit a timm model called `name`, and what to do, in the cases that people often have."""
    expected, config = model.state_dict(), model.pretrained_cfg
    if not expected.keys() & weights.keys() and any(map(TRANSFORMERS.search, weights)):
        return "its names are those of the library transformers. Give the weights in timm's layout."
    channels, ours = (_size(one, config.get("first_conv"), 1) for one in (weights, expected))
    if channels not in (None, ours):
        return f"it takes images with {channels} channel(s). Give one for RGB images."
    classes, ours = (_size(one, config.get("classifier"), 0) for one in (weights, expected))
    if classes not in (None, ours):
        about = {key: config[key] for key in ("input_size", "mean", "std")}
        folder = {"architecture": config.get("architecture"), "num_classes": classes, "pretrained_cfg": about}
        return (
            f"it has {classes} classes, and '{name}' has {ours}. Give a folder as `backbone` with a config.json such "
            f"as {json.dumps(folder)}, and its own size, mean and std."
        )
    return None


def _size(weights: dict[str, Tensor], layers: Any, dimension: int) -> int | None:
    names = [layers] if isinstance(layers, str) else layers or []
    shapes = [weights[key].shape for name in names if (key := f"{name}.weight") in weights]
    return int(shapes[0][dimension]) if shapes and len(shapes[0]) > dimension else None
