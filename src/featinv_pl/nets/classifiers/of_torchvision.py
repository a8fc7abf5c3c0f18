"""Classifiers of torchvision: `torchvision/resnet50`, with any of its published weights or those of a file."""

import difflib
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError
from torch import nn
from torchvision import models
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError, reason
from featinv_pl.nets.classifiers.network import CONFIG, WEIGHTS, Network, fill_from, write_weights
from featinv_pl.nets.classifiers.preparation import Preparation
from featinv_pl.nets.weights import read_weights

PREFIX = "torchvision/"
LIBRARY: Final = "torchvision"  # in the config.json of a folder
TIMEOUT = 8.0  # seconds in which the server of the weights must answer
AUXILIARY = ("aux1", "aux2", "AuxLogits")  # heads of which only training takes notice
Pixels = Annotated[int, Field(ge=1, le=4096)]
Channels = tuple[float, float, float]


class Config(TypedDict):
    """The `config.json` of a folder."""

    library: Literal["torchvision"]
    architecture: str
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)]
    transform_input: bool
    input_size: Pixels
    resize_size: Pixels
    interpolation: Literal["nearest", "bilinear", "bicubic"]
    mean: Channels
    std: Channels
    class_names: list[str] | None


def open_named(name: str, weights: str, input_size: int | None) -> Network:
    """The classifier of a name such as `torchvision/resnet50`.

    Args:
        name: With the prefix.
        weights: `pretrained` for torchvision's default, the name of others that it publishes for this model such as
            `IMAGENET1K_V1`, `random`, or a file, whose head decides the number of classes.
        input_size: Side of the images, if not that of the published weights.

    Raises:
        UserError: There is no such model, there are no such weights, or they cannot be fetched.
    """
    architecture = name.removeprefix(PREFIX)
    _check_architecture(architecture)
    published = models.get_model_weights(architecture)
    chosen = published.DEFAULT if weights == "pretrained" else published.__members__.get(weights)
    if chosen is not None:
        model = _download(architecture, chosen)
    elif weights == "random":
        model = _build(architecture)
    elif Path(weights).is_file():
        head = list(_build(architecture).state_dict())[-1]
        heads = [one for key, one in read_weights(Path(weights), "`weights`").items() if key.endswith(head)]
        model = _build(architecture, len(heads[-1]) if heads and heads[-1].ndim else None)
        fill_from(model, weights, name)
    else:
        raise UserError(
            f"`weights`: '{weights}' is neither a file nor published for '{name}'. Give "
            f"{', '.join(published.__members__)}, `pretrained`, `random`, or a file of weights."
        )
    transform = (chosen or published.DEFAULT).transforms()
    side = input_size or transform.crop_size[0]
    config: Config = {
        "library": LIBRARY,
        "architecture": architecture,
        "num_classes": len(list(model.state_dict().values())[-1]),
        "transform_input": getattr(model, "transform_input", False),
        "input_size": side,
        "resize_size": round(transform.resize_size[0] * side / transform.crop_size[0]),
        "interpolation": transform.interpolation.value,
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "class_names": list(chosen.meta["categories"]) if chosen is not None else None,
    }
    return _network(name, model, config, published=weights == "pretrained")


def open_folder(folder: Path, input_size: int | None) -> Network:
    """The classifier of a folder, as `Network.save` writes it."""
    try:
        config = TypeAdapter(Config).validate_json((folder / CONFIG).read_bytes())
    except (OSError, ValidationError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"`backbone`: '{folder / 'config.json'}' is damaged ({why}). Copy the folder again.") from error
    _check_architecture(config["architecture"])
    model = _build(config["architecture"], config["num_classes"])
    if config["transform_input"]:
        model.transform_input = True
    fill_from(model, str(folder / WEIGHTS), PREFIX + config["architecture"], "`backbone`")
    if input_size:
        resize = round(config["resize_size"] * input_size / config["input_size"])
        config |= {"input_size": input_size, "resize_size": resize}
    return _network(str(folder), model, config)


def _network(name: str, model: Any, config: Config, published: bool = False) -> Network:
    side, interpolation = config["input_size"], InterpolationMode(config["interpolation"])
    crop = Compose([Resize(config["resize_size"], interpolation), CenterCrop(side), PILToTensor()])
    return Network(
        name=name,
        title=PREFIX + config["architecture"],
        score_name=f"torchvision-{config['architecture']}",
        model=model,
        preparation=Preparation((side, side), config["mean"], config["std"], interpolation, crop),
        logits=model,
        save=partial(_save, model, config),
        class_names=config["class_names"],
        names_from="`backbone`: class_names in config.json",
        published=published,
    )


def _save(model: nn.Module, config: Config, folder: Path) -> None:
    write_weights(model, folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _check_architecture(architecture: str) -> None:
    if architecture not in (known := models.list_models(module=models)):
        close = difflib.get_close_matches(architecture, known, n=3)
        hint = f"Did you mean {', '.join(PREFIX + one for one in close)}? " if close else ""
        raise UserError(
            f"`backbone`: '{PREFIX}{architecture}' is not an image classifier of torchvision. {hint}"
            "`torchvision.models.list_models(module=torchvision.models)` lists all names."
        )


def _build(architecture: str, num_classes: int | None = None) -> Any:
    """A model with random weights."""
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if architecture in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # by which others would be drawn for half a minute
    return _without_auxiliary_heads(models.get_model(architecture, weights=None, **options))


def _download(architecture: str, weights: Any) -> Any:
    """A model with published weights, from torch's cache or the network."""
    try:
        with _patient(TIMEOUT):
            return _without_auxiliary_heads(models.get_model(architecture, weights=weights, progress=False))
    except (OSError, RuntimeError) as error:  # of the connection, and of a file that is not what was published
        raise UserError(
            f"`backbone`: the weights {weights} of torchvision could not be fetched from {weights.url} "
            f"({reason(error)}). Check the network, or download them and give the file as `weights`."
        ) from error


def _without_auxiliary_heads(model: Any) -> Any:
    for name in AUXILIARY:
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
            model.aux_logits = False
    return model


@contextmanager
def _patient(seconds: float) -> Iterator[None]:
    """Wait no longer for a server; torch's download has no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
