"""Classifiers of timm: its names, names on the hub, and folders in its layout."""

import difflib
import re
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

from featinv_pl.errors import UserError, reason
from featinv_pl.nets.classifier_files import misfit, read_classifier
from featinv_pl.nets.classifiers.network import CONFIG, Network
from featinv_pl.nets.classifiers.preparation import Preparation
from featinv_pl.nets.hub import read_config, within_reach

EMBEDDINGS = {384, 512, 640, 768, 1024, 1152, 1280}  # widths of those that CLIP's kind projects to


def open_named(name: str, weights: str, input_size: int | None) -> Network:
    """The classifier of a timm name, a name on the hub (`hf-hub:org/name`), or a folder in timm's layout.

    Args:
        name: One of these.
        weights: `pretrained`, `random`, or a file of the architecture, whose older layouts timm converts.
        input_size: Side of the images, if not that of the configuration.

    Raises:
        UserError: There is no such model, its weights cannot be had, or it is not one of RGB images.
    """
    model: Any = _create(name, weights, input_size)
    if (channels := getattr(model, "in_chans", 3)) != 3:
        raise UserError(f"`backbone`: '{name}' takes images with {channels} channel(s). Give one for RGB images.")
    try:
        preparation = Preparation.of_config(_data_config(model, input_size))
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise UserError(
            f"`backbone`: '{name}' does not say how images are prepared for it ({error}). Give another model."
        ) from error
    config, is_folder = model.pretrained_cfg, Path(name).is_dir()
    parts = [config.get("architecture"), None if is_folder else config.get("tag")]
    return Network(
        name=name,
        title=str(config.get("architecture")) if is_folder else name,
        score_name=re.sub(r"[^\w-]", "-", "-".join(part for part in parts if part)),
        model=model,
        preparation=preparation,
        logits=model,
        save=partial(_save, model),
        class_names=config.get("label_names"),
        names_from="`backbone`: label_names in config.json",
        classifies=_classifies(model),
        has_head=True,
        published=not is_folder and weights == "pretrained",
    )


def is_name(name: str) -> bool:
    """Whether timm has an architecture of this name, whatever tag follows it."""
    return bool(timm.is_model(name.split(".")[0]))


def _save(model: Any, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` in timm's layout."""
    save_for_hf(model, str(folder), safe_serialization=True)


def _create(name: str, weights: str, input_size: int | None) -> Any:
    source = name
    if Path(name).is_dir():
        source = f"local-dir:{name}"
        if weights == "pretrained":
            read_config(Path(name, CONFIG), "`backbone`", "Give a folder in timm's layout.")
    elif ":" not in name and not is_name(name):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
        hint = f"Did you mean {', '.join(close)}? " if close else ""
        raise UserError(
            f"`backbone`: '{name}' is neither a folder nor a timm model. {hint}`timm.list_models()` lists all names; "
            "others are torchvision/NAME, hf/ORG/NAME and package.module.Class."
        )
    overlay: dict[str, Any] = {}
    if weights not in ("pretrained", "random"):  # timm converts older layouts, as of its own weights
        overlay = {"state_dict": read_classifier(Path(weights)), "custom_load": False, "source": None}
    options: dict[str, Any] = {"pretrained": weights != "random", "pretrained_cfg_overlay": overlay}
    fetched = source == name and (weights == "pretrained" or ":" in name)
    try:
        with within_reach() if fetched else nullcontext():
            model = timm.create_model(source, **options)
            if input_size and model.pretrained_cfg.get("fixed_input_size"):
                # Built again, so that timm fits tables of positions to the grid while it loads the weights.
                model = timm.create_model(source, **options, img_size=input_size)
        model.pretrained_cfg.pop("state_dict", None)
        return model
    except Exception as error:  # a hostile configuration can raise anything
        found = reason(error)
        if overlay:
            found += ". Give the file of that architecture, undamaged."
            with suppress(Exception):  # of a configuration that timm cannot build at all
                found = misfit(overlay["state_dict"], timm.create_model(source), name) or found
            raise UserError(f"`weights`: '{weights}' does not hold the weights of '{name}': {found}") from error
        if error.args == ("architecture",):
            found = "its config.json does not name an architecture of timm"
        raise UserError(
            f"`backbone`: '{name}' could not be loaded ({found}). Check the name and the network, copy its folder "
            "again, or download the weights and give the file as `weights`."
        ) from error


def _data_config(model: Any, input_size: int | None) -> dict[str, Any]:
    """The data configuration of timm: that of testing, with its own crop, where the size asked for is that one."""
    if input_size is None:
        return dict(resolve_model_data_config(model))
    tested = resolve_model_data_config(model, use_test_size=True)
    config = tested if tested["input_size"][1:] == (input_size, input_size) else resolve_model_data_config(model)
    return {**config, "input_size": (3, input_size, input_size)}


def _classifies(model: Any) -> bool:
    """Whether a timm model has classes. The head of a tower of CLIP's kind is a projection, unless it was tuned."""
    config = model.pretrained_cfg
    name = f"{config.get('architecture')}.{config.get('tag')}"
    tower = ("clip" in name or "_pe_core_" in name) and "_ft_in" not in name
    return bool(model.num_classes) and not (tower and model.num_classes in EMBEDDINGS)
