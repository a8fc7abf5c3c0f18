"""What a `Backbone` asks of a classifier, whichever library it is of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from featinv_pl.errors import UserError
from featinv_pl.nets.classifiers.preparation import Preparation
from featinv_pl.nets.weights import fill, read_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of a folder


@dataclass(frozen=True)
class Network:
    """A classifier of some library, opened.

    Args:
        name: As it was given.
        title: What it is called wherever its files are.
        score_name: The architecture, and the weights if they are published ones, as part of a score's name.
        model: The network.
        preparation: How pictures become its input.
        logits: The logits (B, K) of images (B, 3, H, W), normalised; of a network that has no classes, anything.
        class_names: In the order of the logits; None if they are not known.
        names_from: What gave them, for errors.
        classifies: Whether there are classes.
        layer: Whose output is the map, unless another is asked for.
        has_head: Whether it has timm's `forward_features` and `forward_head`, which name the penultimate layer.
        published: Whether its name alone loads it, wherever that is done.
        save: Writes it to a folder from which it can be loaded.
    """

    name: str
    title: str
    score_name: str
    model: nn.Module
    preparation: Preparation
    logits: Callable[[Tensor], Tensor]
    save: Callable[[Path], None]
    class_names: Any = None
    names_from: str = "`class_names`"
    classifies: bool = True
    layer: str | None = None
    has_head: bool = False
    published: bool = False


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights of a network to its folder, each for itself: safetensors refuses those that share memory."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().clone() for name, value in model.state_dict().items()}, folder / WEIGHTS)


def fill_from(model: nn.Module, weights: str, name: str, option: str = "`weights`") -> None:
    """Load a file of weights into a network, whatever has wrapped the network while they were saved.

    Args:
        model: Is left as it was if anything is wrong.
        weights: The file, in which further tensors may be.
        name: The network, for errors.
        option: The argument that named the file, for errors.

    Raises:
        UserError: There is no such file, or it does not hold the weights of the network, once.
    """
    if not Path(weights).is_file():
        raise UserError(f"{option}: '{weights}' is not a file. Give one, `pretrained`, or `random`.")
    found, names = read_weights(Path(weights), option), model.state_dict().keys()
    first = next(iter(names), "")
    prefixes = [key.removesuffix(first) for key in found if key.endswith(first)]
    states = [
        {name: found[prefix + name] for name in names}
        for prefix in prefixes
        if all(prefix + name in found for name in names)
    ]
    if any(not torch.equal(value, states[0][key]) for state in states[1:] for key, value in state.items()):
        raise UserError(
            f"{option}: '{weights}' holds two networks of the same names and other values. Give a file with one."
        )
    fill(model, states[0] if states else found, f"classifier '{name}'", f"{option}: '{weights}'")
