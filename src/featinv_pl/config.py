"""Configurations: files on bases of others, values that people and sweeps write, and what reads them."""

import os
import re
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader

from featinv_pl.errors import UsageError, UserError
from featinv_pl.files import read_text
from featinv_pl.mistakes import remember, shown
from featinv_pl.trust import Parser

MODE = "yaml with base"
NAMED = r"\$\{(\w+)\}"
_folder: ContextVar[Path] = ContextVar("folder", default=Path())
MOVED = {
    **dict.fromkeys(("hidden_channels", "num_layers"), "`model.encoder.{}`"),
    **dict.fromkeys(("dropout", "consistency", "consistency_below"), "`model.objective.{}`"),
    **dict.fromkeys(("activation_checkpointing", "channels_last", "compile"), "`model.execution.{}`"),
    **dict.fromkeys(("control", "train"), "`model.adapt.{}`"),
    **dict.fromkeys(("judge", "num_samples"), "`{}` of the Evaluation callback"),
    "min_snr_gamma": "`model.objective.weighting: min-snr`",
    "arms": "`samplers` of the Evaluation callback",
    **dict.fromkeys(("PerSource", "ReconstructionGrid", "DrawnImages"), "part of the Evaluation callback"),
    **dict.fromkeys(("dropout_features", "dropout_prompt", "null_map", "text_scale"), ""),
}
"""Options and callbacks of earlier versions, and where they are now; empty for those that have been removed."""


class ConfigParser(Parser):
    """A parser of files on bases of others, which are relative to the file that includes them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the error, which for an option of an earlier version is one sentence."""
        found = re.findall(r"import path string: ([\w.]+)", message)
        if "FeatureInversion'" in message:  # the parsers within, which cannot tell whose option it is, leave it to this
            found += re.findall(r"(?:[Oo]ption '|unrecognized arguments: --)([\w.]+)", message)
        names = [name for dotted in found for name in (dotted.split(".")[-1], dotted.split(".")[0])]
        if (old := next((name for name in names if name in MOVED), None)) is not None:
            place = MOVED[old].format(old)
            now = f"is {place} now" if place else "has been removed, since it did not pay: leave it out"
            raise UserError(f"'{old}' of an earlier version {now}.")
        super().error(message, ex)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a file, wherever jsonargparse changes to in order to read it."""
        file = Path(path).absolute()
        text = read_text(
            Path(path), "--config", "Give a YAML file."
        )  # or what is not one is a traceback, or has no end
        remember(file, text)
        if not isinstance(_settings(text, file, "--config"), dict):
            raise UsageError(f"--config: '{path}' holds no options. Give lines such as `trainer:` and `model:`.")
        token = _folder.set(file.parent)
        try:
            return super().parse_path(path, *args, **kwargs)
        finally:
            _folder.reset(token)


def load_yaml(text: str) -> Any:
    """Read YAML in which `base: FILE`, or several, puts other files' settings beneath those of this one.

    Paths are relative to the including file. `${name}` is a value of the mapping `values`, of this file or a base.
    `~/` is the home folder. `None` is null, as a sweep of W&B writes it.
    """
    settings = _on_base(_parse(text), _folder.get(), ())
    if isinstance(settings, dict) and isinstance(values := settings.get("values"), dict):
        del settings["values"]
        settings = _each(settings, lambda text: _filled(text, values))
    settings = _each(settings, lambda text: os.path.expanduser(text) if text.startswith("~/") else text)
    return None if settings == "None" else settings


set_loader(MODE, load_yaml, exceptions=(yaml.YAMLError,))


def _parse(text: str) -> Any:
    try:
        return get_loader("yaml")(text)
    except (ValueError, TypeError, RecursionError) as error:  # such as an impossible date
        raise yaml.YAMLError(str(error)) from error


def _settings(text: str, path: Path, option: str) -> Any:
    """The content of a file; what is not YAML is an error with its line."""
    try:
        return _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:300]
        raise UserError(f"{option}: '{shown(path)}'{line}, is not YAML: {problem}.") from error


def _on_base(settings: Any, folder: Path, above: tuple[Path, ...]) -> Any:
    if not isinstance(settings, dict) or "base" not in settings:
        return settings
    bases = settings.pop("base")
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        path = (folder / os.path.expanduser(str(base))).absolute()
        advice = "The path is relative to the including file, and no file may be a base of its own."
        if path.resolve() in above:
            raise UserError(f"base: '{path}' is its own base. {advice}")
        text = read_text(path, "base", advice)
        remember(path, text, base=True)
        merged = merge(merged, _on_base(_settings(text, path, "base"), path.parent, (*above, path.resolve())))
    return merge(merged, settings)


def merge(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` over `base`: dictionaries are merged, `key+` appends to a list, all else is replaced."""
    merged = dict(base)
    for key, value in settings.items():
        appended = key.removesuffix("+")
        if key != appended and appended in merged:
            merged[appended] = [*merged[appended], *value]
        elif isinstance(merged.get(key), dict) and isinstance(value, dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _filled(text: str, values: dict[str, Any]) -> Any:
    """A text with values in place of their names; one that is a name alone becomes the value, of whatever type."""
    for name in re.findall(NAMED, text):
        if name not in values:
            raise UserError(f"'{text}': `values` has no '{name}', but {', '.join(values)}.")
    whole = re.fullmatch(NAMED, text)
    return values[whole[1]] if whole else re.sub(NAMED, lambda name: str(values[name[1]]), text)


def _each(value: Any, change: Callable[[str], Any]) -> Any:
    """Settings with every text in them changed."""
    if isinstance(value, dict):
        return {key: _each(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_each(one, change) for one in value]
    return change(value) if isinstance(value, str) else value
