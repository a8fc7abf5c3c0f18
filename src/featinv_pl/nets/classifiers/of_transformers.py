"""Classifiers and vision towers of the library transformers: `hf/org/name` on the hub, or a folder."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from featinv_pl.errors import UserError, reason
from featinv_pl.nets.classifiers.network import CONFIG, Network, fill_from
from featinv_pl.nets.classifiers.preparation import Preparation
from featinv_pl.nets.hub import find_folder, read_config
from featinv_pl.nets.weights import check_finite

PREFIX = "hf/"
HEAD = "ForImageClassification"
NO_NAME = re.compile(r"LABEL_\d+")  # what the library calls classes that have no names
FILES, PICKLES = ["*.json", "*.safetensors"], ["*.bin"]


def open_named(name: str, weights: str, input_size: int | None) -> Network:
    """The classifier or vision tower in transformers' layout, with its image processor.

    Args:
        name: `hf/` and a name on the hub or a folder; or a folder without the prefix.
        weights: `pretrained` for those beside the configuration, `random`, or a file.
        input_size: Side of the images, if not that of the image processor.

    Raises:
        UserError: It cannot be had, is not a model of images, or lacks weights.
    """
    source = name.removeprefix(PREFIX)
    folder = find_folder(source, FILES, "`backbone`")
    if weights == "pretrained" and not any(folder.glob("*.safetensors")) and not Path(source).is_dir():
        folder = find_folder(source, FILES + PICKLES, "`backbone`")
    stated = read_config(folder / CONFIG, "`backbone`", "Give a folder in transformers' layout.")
    if "architecture" in stated:
        raise UserError(
            f"`backbone`: '{name}' is a timm model. Give "
            f"{'the folder without hf/' if Path(source).is_dir() else f'hf-hub:{source}'}."
        )
    with _quiet():
        model, processor = _load(name, folder, weights)
    if input_size is not None:
        _resize(processor, input_size)
    try:
        preparation = Preparation.of_transform(partial(_process, processor), input_size)
    except Exception as error:  # of whatever its configuration says
        raise UserError(
            f"`backbone`: the image processor of '{name}' cannot be used ({reason(error)}). Give another model, or "
            "this one in Python: `Backbone.from_module(model, transform=...)`."
        ) from error
    classifies = HEAD in type(model).__name__
    labels = [label for _, label in sorted((model.config.id2label or {}).items())] if classifies else []
    on_hub = not Path(source).is_dir()
    return Network(
        name=name,
        title=name if on_hub else type(model).__name__,
        score_name=re.sub(r"[^\w-]", "-", source if on_hub else type(model).__name__),
        model=model,
        preparation=preparation,
        logits=partial(_logits, model, _options(model, preparation.input_size)),
        save=partial(_save, model, processor),
        class_names=labels if labels and not all(map(NO_NAME.fullmatch, labels)) else None,
        names_from="`backbone`: id2label in config.json",
        classifies=classifies,
        published=on_hub and weights == "pretrained",
    )


def _load(name: str, folder: Path, weights: str) -> tuple[Any, Any]:
    """The network, in single precision, and its image processor."""
    import transformers  # two seconds, which others need not spend

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        head = next((one for one in config.architectures or () if HEAD in one), "")
        if head:
            kind = getattr(transformers, head)
        else:
            config = getattr(config, "vision_config", config)  # of a model of images and texts, the former alone
            kind = transformers.AutoModel
        with torch.device("meta"):
            network = kind(config) if head else kind.from_config(config)
        if network.main_input_name != "pixel_values":
            raise ValueError(f"the input of {type(network).__name__} is {network.main_input_name}, and not images")
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        if weights != "pretrained":
            model, missing = type(network)(config), []
        else:
            model, report = type(network).from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                # Old folders hold a pickle alone, which transformers reads as tensors only.
                use_safetensors=any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")),
                output_loading_info=True,
            )
            missing = sorted(report["missing_keys"])
    except Exception as error:  # a hostile configuration can raise anything
        raise UserError(
            f"`backbone`: '{name}' is not a model of images that transformers can load ({reason(error)}). Give an "
            "image classifier or a vision tower, with its preprocessor_config.json."
        ) from error
    if missing and all(key.startswith("pooler.") for key in missing) and hasattr(model, "pooler"):
        model.pooler, missing = None, []  # added by the library, random, and no part of the map
    if missing:
        raise UserError(
            f"`backbone`: '{name}' lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}. "
            "Its files are incomplete or of another architecture: download them again."
        )
    if weights not in ("pretrained", "random"):
        fill_from(model, weights, name)
    check_finite(model.state_dict(), f"'{name}'", "`backbone`")
    return model.float(), processor


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from listing the weights of a text tower that are left out, and from drawing bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _resize(processor: Any, side: int) -> None:
    """Let an image processor make images of another side, of the same crop as before."""
    sizes = {"size": dict(processor.size or {}), "crop_size": dict(getattr(processor, "crop_size", None) or {})}
    before = sizes["crop_size"].get("height") or sizes["size"].get("height") or sizes["size"].get("shortest_edge")
    if not before:
        return
    for name, size in sizes.items():
        if size:
            changed = {key: round(value * side / before) for key, value in size.items() if isinstance(value, int)}
            setattr(processor, name, type(getattr(processor, name))(**changed))


def _process(processor: Any, picture: Image.Image) -> Tensor:
    pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    return pixels


def _options(model: Any, input_size: tuple[int, int]) -> dict[str, bool]:
    """What a transformer must be told to take images of another size than it was trained on."""
    side = getattr(model.config, "image_size", None)
    trained = (side, side) if isinstance(side, int) else tuple(side or input_size)
    known = "interpolate_pos_encoding" in signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if known and trained != input_size else {}


def _logits(model: Any, options: dict[str, bool], images: Tensor) -> Tensor:
    """The logits; of a tower without any, none of each image."""
    output = model(images, **options)
    logits: Tensor = output["logits"] if "logits" in output else images.new_zeros(len(images), 0)
    return logits


def _save(model: Any, processor: Any, folder: Path) -> None:
    with _quiet():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
