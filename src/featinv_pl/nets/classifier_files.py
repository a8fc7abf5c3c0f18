"""What the files of a classifier say: the names of its classes, and weights as training scripts leave them."""

import json
import re
from collections import Counter
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
TENCH = ("tench", "n01440764")  # its first class
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
    def of(cls, names: Any, num_classes: int, given: str = "`class_names`") -> Self:
        """The classes of a classifier with as many logits.

        Folders of ImageNet are called by wnids, whatever a classifier of it calls its classes. Its heads (1k, 12k,
        21k and 22k) are told by the number of classes, and that of 1k by the first name as well.

        Args:
            names: In the order of the logits; None if they are not known.
            num_classes: Number of logits.
            given: What gave the names, for errors.

        Raises:
            UserError: They are not as many different names.
        """
        subset = infer_imagenet_subset({"num_classes": num_classes}) if num_classes else None
        if not names or not num_classes:
            return cls(_wnids(subset) if subset else {}, num_classes if num_classes == IMAGENET or not subset else 0)
        listed = names if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else ()
        labels = {name: label for label, name in enumerate(listed)}
        imagenet = subset is not None and (num_classes != IMAGENET or (listed[:1] and listed[0].startswith(TENCH)))
        if len(listed) != num_classes or not (imagenet or len(labels) == num_classes):
            raise UserError(
                f"{given} are not {num_classes} different names, one for each class in the order of the logits"
                f"{f', but {len(listed)}' if listed else ''}. Correct them."
            )
        if not imagenet:
            return cls(labels, 0)
        counts = Counter(listed)  # ImageNet has two cranes
        unique = {name: label for name, label in labels.items() if counts[name] == 1}
        return cls(_wnids(subset) | unique, num_classes if num_classes == IMAGENET else 0)

    def label(self, name: str) -> int:
        """The label of a class by its name; -1 for a name that is not among the classifier's."""
        if name.isdecimal() and int(name) < self.numbered:
            return int(name)
        return self.labels.get(name, NO_LABEL)


@cache
def _wnids(subset: str) -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(ImageNetInfo(subset).label_names())}


def read_classifier(path: Path) -> dict[str, Tensor]:
    """Read the state dict of the largest network in a file, without the prefixes of what has wrapped it.

    Raises:
        UserError: The file cannot be read, or holds two networks of the same names and other values.
    """
    networks: dict[str, dict[str, Tensor]] = {}
    for name, value in read_weights(path, "`weights`").items():
        rest = WRAPPERS.sub("", name)
        networks.setdefault(name.removesuffix(rest), {})[rest] = value
    chosen = max(networks, key=lambda prefix: len(networks[prefix]))
    for prefix, other in networks.items():
        if other.keys() == networks[chosen].keys() and any(
            not torch.equal(value, networks[chosen][name]) for name, value in other.items()
        ):
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
    """A size of the first of the layers that the weights have."""
    names = [layers] if isinstance(layers, str) else layers or []
    shapes = [weights[key].shape for name in names if (key := f"{name}.weight") in weights]
    return int(shapes[0][dimension]) if shapes and len(shapes[0]) > dimension else None
