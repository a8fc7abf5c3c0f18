"""A classifier's weights from one file, as training scripts leave them."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.nets.weights import read_weights

# What wraps a network while it trains: DataParallel, torch.compile, Lightning, the robustness library.
WRAPPERS = re.compile(r"^((module|_orig_mod|model|net|attacker|backbone)\.)+")
TRANSFORMERS = re.compile(r"\b(embeddings?|embedder)\.|\bencoder\.(layer|layers|stages)\.")  # names of that library


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
        return (
            "its names are those of the library transformers. Give the weights in timm's layout, which has most models"
        )
    channels, ours = (_size(one, config.get("first_conv"), 1) for one in (weights, expected))
    if channels not in (None, ours):
        return f"it takes images with {channels} channel(s). Give one for RGB images."
    classes, ours = (_size(one, config.get("classifier"), 0) for one in (weights, expected))
    if classes not in (None, ours):
        about = {"input_size": config["input_size"], "mean": config["mean"], "std": config["std"]}
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
