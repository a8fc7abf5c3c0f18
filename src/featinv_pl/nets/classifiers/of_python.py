"""Classifiers of one's own: a module in Python, or the path of a class or function that makes one."""

import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from featinv_pl.errors import UserError, reason
from featinv_pl.files import read_json
from featinv_pl.nets.classifiers.network import CONFIG, WEIGHTS, Network, fill_from, write_weights
from featinv_pl.nets.classifiers.preparation import Preparation, Transform
from featinv_pl.nets.trusted import not_trusted, trusted_imports

LIBRARY = "python"  # in the config.json of a folder
EXAMPLE = '{"input_size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}'


def is_class_path(name: str) -> bool:
    """Whether a name is that of something in a package that exists or is trusted. Nothing is imported."""
    package, *rest = name.split(".")
    if not rest or not all(part.isidentifier() for part in (package, *rest)):
        return False
    known = package in sys.modules or find_spec(package) is not None
    return known or any(one.split(".")[0] == package for one in trusted_imports())


def open_class_path(path: str, weights: str, input_size: int | None) -> Network:
    """The classifier that a class or function makes when it is called without arguments.

    It is a module, described by attributes of its own: `transform`, `class_names` (optional), as in `open_module`. A
    function may return a `Backbone` as well.

    Args:
        path: Such as `my_package.models.Net`.
        weights: `pretrained` and `random` leave those that it is made with; else a file.
        input_size: Side of the images, where its transform is a dictionary.

    Raises:
        UserError: It is not trusted, cannot be made, or is not a classifier.
    """
    if not any(path.startswith(f"{one}.") for one in trusted_imports()):
        raise not_trusted(path)
    module, _, name = path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)()
    except UserError:
        raise
    except Exception as error:  # it is anybody's code
        raise UserError(
            f"`backbone`: '{path}' could not be imported and called without arguments "
            f"({type(error).__name__}: {reason(error)}). Give a class or function of a module that Python finds "
            "(PYTHONPATH=. for one in this folder) and that takes no arguments."
        ) from error
    network, layer = getattr(made, "network", None), getattr(made, "layer", None)
    if not isinstance(network, Network):
        network, layer = open_module(made, None, None, path, input_size), None
    elif input_size and network.preparation.input_size != (input_size, input_size):
        raise UserError(
            f"`input_size`: {input_size} is not what '{path}' makes a Backbone for: {network.preparation.input_size}. "
            "Leave it out, or change the function."
        )
    if weights not in ("pretrained", "random"):
        fill_from(network.model, weights, path)
    save, score_name = partial(_save, network.model, path, True), re.sub(r"\W", "-", path)
    return replace(network, name=path, title=path, score_name=score_name, layer=layer, save=save)


def open_folder(folder: Path, input_size: int | None) -> Network:
    """The classifier of a folder, as `Network.save` writes it, where it is of a class path."""
    config = read_json(folder / CONFIG, "`backbone`", "Copy the folder again.")
    path = config.get("class_path")
    if not isinstance(path, str):
        raise UserError(
            f"`backbone`: the classifier in '{folder}' was a module in Python ({config.get('module')}), which files "
            "cannot make again. Give it from Python: `FeatInvPipeline.from_pretrained(folder, "
            "classifier=Backbone.from_module(...))`."
        )
    return open_class_path(path, str(folder / WEIGHTS), input_size)


def open_module(
    model: Any,
    transform: Transform | None,
    class_names: Sequence[str] | None,
    name: str | None = None,
    input_size: int | None = None,
) -> Network:
    """The classifier that a module is.

    Args:
        model: Returns logits (B, K) of images (B, 3, H, W): a tensor, or the `logits` of what it returns.
        transform: As in `Preparation.of_transform`; None for the module's attribute `transform` or `pretrained_cfg`.
        class_names: In the order of the logits; None for its attribute `class_names`, or if they are not known.
        name: What it is called; None for that of its class.
        input_size: Side of the images, where its transform is a dictionary.

    Raises:
        UserError: It is not a module, or its transform cannot be used.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"`backbone`: {name or model!r:.100} is a {type(model).__name__}, and not a torch.nn.Module.")
    name = name or f"{type(model).__module__}.{type(model).__qualname__}"
    if transform is None:
        transform = getattr(model, "transform", None) or getattr(model, "pretrained_cfg", None)
    try:
        if transform is None:
            raise ValueError("there is none")
        preparation = Preparation.of_transform(transform, input_size)
    except Exception as error:  # it may be anybody's code
        raise UserError(
            f"`transform`: pictures cannot be prepared for '{name}' ({reason(error)}). Give what it was evaluated "
            "with, or the module an attribute `transform`: a function from a PIL picture to a normalised tensor "
            f"(3, H, W), such as `weights.transforms()` of torchvision, or a dictionary such as {EXAMPLE}."
        ) from error
    if class_names is None:
        class_names = getattr(model, "class_names", None)
    return Network(
        name=name,
        title=name,
        score_name=re.sub(r"\W", "-", name),
        model=model.float(),
        preparation=preparation,
        logits=partial(_logits, model),
        save=partial(_save, model, name, False),
        class_names=class_names,
        classifies=class_names is None or len(class_names) > 0,
        has_head=hasattr(model, "forward_features") and hasattr(model, "forward_head"),
    )


def _logits(model: nn.Module, images: Tensor) -> Any:
    """The logits in what a module returns: it, its `logits`, or the only matrix of a tuple."""
    output = model(images)
    if isinstance(output, tuple | list):
        matrices = [one for one in output if isinstance(one, Tensor) and one.ndim == 2]
        return matrices[0] if len(matrices) == 1 else output
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)


def _save(model: nn.Module, name: str, is_class_path: bool, folder: Path) -> None:
    write_weights(model, folder)
    config = {"library": LIBRARY, "class_path": name if is_class_path else None, "module": name}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
