"""Configurations: files on bases of others, values that people and sweeps write, and what reads them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader, set_loader

from featinv_pl.errors import UserError
from featinv_pl.files import expand_home, parse_yaml, read_pipe, read_text
from featinv_pl.trust import Parser

MODE = "yaml with base"
PIPE = re.compile(r"/dev/fd/\d+|/proc/(self|\d+)/fd/\d+|/dev/stdin")
_folder: ContextVar[Path] = ContextVar("folder", default=Path())


def prepared(args: list[str]) -> list[str]:
    """A command line whose configurations can be read: a file that cannot is refused, a pipe gives its contents.

    jsonargparse would read without end, or open a pipe such as that of `--config <(...)` more than once.
    """
    line: list[str] = []
    for place, arg in enumerate(args):
        option, joined, given = arg.partition("=")
        after = place > 0 and args[place - 1] in ("-c", "--config")
        named = arg if after else given if joined and option in ("-c", "--config") else ""
        if PIPE.fullmatch(named):
            text = read_pipe(Path(named), "--config", "Give a YAML file.")
            line.append(text if after else f"{option}={text}")
            continue
        if named and Path(named).exists():  # of one that does not, jsonargparse says so
            read_text(Path(named), "--config", "Give a YAML file.")
        line.append(arg)
    return line


class ConfigParser(Parser):
    """A parser that reads files on bases of others, and values as sweeps write them."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse, and keep `None` as text where it is no null."""
        config = super().parse_args(*args, **kwargs)
        keep_text(config)
        return config

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a file, whose bases are relative to it."""
        with within(Path(path).parent):
            return super().parse_path(path, *args, **kwargs)


@contextmanager
def within(folder: Path) -> Iterator[None]:
    """Let `base` be relative to a folder: that of the file which is read, wherever its reader has changed to."""
    token = _folder.set(folder.absolute())
    try:
        yield
    finally:
        _folder.reset(token)


def load_yaml(text: str) -> Any:
    """Read YAML in which `base: FILE` puts the settings of another file beneath those of this one.

    Of several, `base: [FILE, FILE]`, each overrides those before it. Paths are relative to the including file.
    `~/` is the home folder. `None` is null, as a sweep of W&B writes it; an option of text takes it as text.
    """
    settings = expand_home(_on_base(parse_yaml(text, get_loader("yaml")), _folder.get(), ()))
    return None if settings == "None" else settings


set_loader(MODE, load_yaml, exceptions=(yaml.YAMLError,))


def _on_base(settings: Any, folder: Path, above: tuple[Path, ...]) -> Any:
    if not isinstance(settings, dict) or "base" not in settings:
        return settings
    bases = settings.pop("base")
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        path = folder / str(expand_home(base))
        advice = "The path is relative to the including file, and no file may be a base of its own."
        if path.resolve() in above:
            raise UserError(f"base: '{path.absolute()}' is its own base. {advice}")
        text = read_text(path.absolute(), "base", advice)
        try:
            contents = parse_yaml(text, get_loader("yaml"))
        except yaml.YAMLError as error:
            raise UserError(f"base: '{path.absolute()}' is no YAML ({' '.join(str(error).split())[:300]}).") from error
        merged = merge(merged, _on_base(contents, path.parent, (*above, path.resolve())))
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


def keep_text(settings: Any) -> None:
    """Give options of text back the `None` that jsonargparse has set to null, though their type has no null.

    Args:
        settings: A parsed configuration, changed in place: each class by its path and arguments.
    """
    for value in settings if isinstance(settings, list) else vars(settings).values():
        if isinstance(value, Namespace | list):
            keep_text(value)
    arguments = getattr(settings, "init_args", None)
    if arguments is None:
        return
    module, _, name = settings.class_path.rpartition(".")
    for kind in getattr(getattr(import_module(module), name), "__mro__", ()):  # a function has none
        for option, annotation in getattr(kind.__init__, "__annotations__", {}).items():
            if annotation is str and option in arguments and arguments[option] is None:
                arguments[option] = "None"
