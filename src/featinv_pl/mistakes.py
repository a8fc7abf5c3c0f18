"""What is wrong with a configuration: one sentence with file and line, instead of jsonargparse's many lines."""

import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from featinv_pl.errors import UserError, nearest

FAMILIES: dict[str, type] = {  # by the last word of their options
    "model": LightningModule,
    "data": LightningDataModule,
    "callbacks": Callback,
    "logger": Logger,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler,
}
KINDS = {"int": "an integer", "float": "a number", "bool": "a truth value", "str": "a text", "dict": "a mapping"}
# What jsonargparse says besides the reason: how it tried, and what it was given.
BESIDES = re.compile(
    r"$|Does not validate|Subtypes:|Errors:|Given value|Expected a path but|Expected a <class '(NoneType|coll.*)'>|"
    r"Subclass types expect|a class path \(str\)|a dict "
)
REFUSED = re.compile(r"(?:[Oo]ption '|unrecognized arguments: )(?:--)?([\w./+-]+)")
SUBCOMMAND = re.compile(r"^(fit|validate|test|predict)\.")
OPTION = re.compile(r"^  (?:-\w[^-]*, )?(--[\w.]+)", re.MULTILINE)
NO_CLASS = re.compile(r"(?:import path string: |no attribute ')([\w.]+)|Unexpected import path format: (\S+)")
_read: ContextVar[tuple[tuple[Path, str], ...]] = ContextVar("read", default=())
_start: ContextVar[str] = ContextVar("start", default=".")


def remember(path: Path, text: str, base: bool = False) -> None:
    """Keep a configuration file that is read, so that mistakes in it are told with its name.

    jsonargparse reads a file, and thereby the bases of it, in the folder of the file.
    """
    if not base:
        _start.set(os.getcwd())
    _read.set((*_read.get(), (path, text)))


def shown(path: Path) -> str:
    """The name of a file as seen from where the command was given."""
    return os.path.relpath(path, _start.get())


def sentence(message: str, parser_help: str) -> str:
    """The reason within a message of jsonargparse, with the option, the nearest name, and where it was given.

    Args:
        message: What jsonargparse says.
        parser_help: Of its parser, which lists the options that belong to no class.
    """
    path, owner, wanted, leaf = "", "", list[str](), ""
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if key := re.match(r'Parser key "([^"]+)":\s*', line):
            path, line = f"{path}.{key[1]}".lstrip("."), line[key.end() :]
        if problem := re.match(r"Problem with given class_path '([\w.]+)'", line):
            owner = problem[1]
        elif expected := re.match(r"Expected an? (?!dot import)(.*?)(?:\. Got value: .*)?$", line):
            if not BESIDES.match(line):
                wanted.append(expected[1])
        elif not BESIDES.match(line):
            leaf = line
            break
    path = SUBCOMMAND.sub("", path).replace(".init_args", "")
    if (name := REFUSED.search(leaf)) is not None:
        return _no_option(SUBCOMMAND.sub("", name[1]).replace(".init_args", ""), leaf, path, owner, parser_help)
    if (unknown := NO_CLASS.search(leaf)) is not None:
        return _no_class(path, unknown[1] or unknown[2])
    if "arguments are required" in leaf:
        names = [SUBCOMMAND.sub("", one) for one in leaf.rpartition(": ")[2].split(", ")]
        options = ", ".join(f"--{path}.{one}".replace("--.", "--") for one in names)
        if owner:
            return f"--{path}: {owner.rpartition('.')[2]} also needs {options}{place(path)}."
        return f"missing: {options}. Give a configuration (--config FILE), or a class (--model=NAME)."
    given = re.findall(r"(?:Got value|Given value): (.*)", message)
    option = f"--{path}: " if path else ""
    if wanted and not leaf:
        return f"{option}'{given[0]}' is not {_kinds(wanted)}{place(path, given[0])}."
    if (lost := re.search(r"(File does not exist|Path is not a file): '(.*)'", leaf)) is not None:
        what = "there is no file" if lost[1].startswith("File") else "not a file:"
        return f"{option}{what} '{os.path.relpath(lost[2])}'."
    reason = " ".join((leaf or message).removeprefix("argument ").split())[:300].rstrip(".")
    return f"{option}{reason}{place(path)}."


def _no_option(name: str, leaf: str, path: str, owner: str, parser_help: str) -> str:
    if leaf.startswith("unrecognized") and f"--{name}" not in leaf:
        advice = f" Give a file by --config {name}." if name.endswith((".yaml", ".yml")) else " Options begin with --."
        return f"unexpected argument '{name}'.{advice}"
    if "before subcommand" in leaf:
        return "--config comes after the command: `featinv-pl COMMAND --config FILE`."
    full = f"{path}.{name}".lstrip(".")
    whose = f"{owner.rpartition('.')[2]} has no option" if owner else "there is no option"
    known = [f"--{path}.{one}" for one in arguments(_class(owner))] if owner else OPTION.findall(parser_help)
    if not owner:
        known += [f"--{group}.{one}" for group in ("model", "data") for kind in own(group) for one in arguments(kind)]
    close = nearest(f"--{full}", known)
    if owner and not close:
        close = f" It has {', '.join(one for one in known if one.count('.') == known[0].count('.'))}."
    return f"{whose} --{full}{place(full)}.{close}"


def _no_class(path: str, name: str) -> str:
    group = path.rpartition(".")[2]
    kinds = (
        _descendants(FAMILIES[group]) if group in FAMILIES else set[type]().union(*map(_descendants, FAMILIES.values()))
    )
    close = nearest(name, (kind.__name__ for kind in kinds))
    if not close:
        names = sorted(kind.__name__ for kind in own(group)) or ["a class path, such as torch.optim.AdamW"]
        close = f" Give {', '.join(names)}, or the path of a class of your own (package.module.Class)."
    return f"--{path}: there is no class '{name}'{place(path, name)}.{close}"


def _kinds(wanted: list[str]) -> str:
    """Types as people call them."""
    kinds, values = list[str](), list[str]()
    for one in wanted:
        if literal := re.match(r"(?:typing\.)?Literal\[(.*)\]", one):
            values += [value.strip().strip("'") for value in literal[1].split(",")]
        else:
            name = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", one)
            kinds.append(KINDS.get(name, name))
    listed = [f"one of {', '.join(values)}"] if values else []
    return " or ".join(dict.fromkeys([*listed, *kinds]))


def own(group: str) -> set[type]:
    """Our classes of a family that a configuration can name."""
    found = _descendants(FAMILIES.get(group, type(None)))
    return {one for one in found if one.__module__.startswith("featinv_pl.") and not inspect.isabstract(one)}


def _descendants(kind: type) -> set[type]:
    children: list[type] = kind.__subclasses__()
    return {one for child in children for one in (child, *_descendants(child)) if one.__name__[0] != "_"}


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def classes(family: type) -> list[str]:
    """The names of the classes of a family that have been imported."""
    return sorted({one.__name__ for one in _descendants(family)})


def arguments(kind: Any) -> dict[str, Any]:
    """The arguments of a class, and those of arguments that are dataclasses, with their types."""
    hints: dict[str, Any] = {}
    with suppress(Exception):  # such as names that are imported for type checkers alone
        hints = get_type_hints(kind if is_dataclass(kind) else kind.__init__)
    found: dict[str, Any] = {}
    for name in inspect.signature(kind).parameters:
        found[name] = hint = hints.get(name)
        if is_dataclass(hint):
            found |= {f"{name}.{field}": one for field, one in arguments(hint).items()}
    return found


def place(option: str, value: str | None = None) -> str:
    """Where the last of the files that were read gives an option (a value), in brackets; empty where none does."""
    for path, text in reversed(_read.get()):
        with suppress(yaml.YAMLError):
            for name, line, scalar in _lines(yaml.compose(text), ""):
                if name == option and value in (None, scalar):
                    return f" ('{shown(path)}', line {line})"
    return ""


def _lines(node: Any, above: str) -> Iterator[tuple[str, int, str | None]]:
    """Options as they stand in a file, with their lines and single values; those of a list are of its classes."""
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            yield from _lines(one, above)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = str(key.value).removesuffix("+")
            option = above if name in ("class_path", "init_args", "dict_kwargs") else f"{above}.{name}".lstrip(".")
            if name not in ("init_args", "dict_kwargs"):
                scalar = value.value if isinstance(value, yaml.ScalarNode) else None
                yield option, key.start_mark.line + 1, scalar
            yield from _lines(value, option)
    elif isinstance(node, yaml.ScalarNode):
        yield above, node.start_mark.line + 1, node.value


@contextmanager
def paths_explained() -> Iterator[None]:
    """Let an error about a path say so if it exists beside the configuration: paths begin at the working directory."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error) + _beside(re.findall("'([^']+)'", str(error)))) from error


def _beside(names: Iterable[str]) -> str:
    for name in names:
        for path, _ in _read.get():
            there = path.parent / name
            with suppress(OSError, ValueError):
                if not Path(name).exists() and there.exists():
                    return (
                        f" Paths in a configuration are relative to the working directory, so give "
                        f"'{os.path.relpath(there)}'."
                    )
    return ""
