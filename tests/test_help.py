"""What `--help` says: of each option what it is, of what is a number in which unit or range."""

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import docstring_parser
import pytest

import featinv_pl
import featinv_pl.cli
from featinv_pl.commands import COMMANDS
from featinv_pl.completion import collected
from featinv_pl.mistakes import own

SIDES = "image_size|input_size"
SHARES = "crop_pct|held_out|dropout|decay|max_bad_fraction"


def with_parts(kind: Any) -> Iterator[Any]:
    """A class, and the dataclasses that it takes as arguments."""
    yield kind
    hints: dict[str, Any] = {}
    with suppress(NameError):  # of types that are imported for type checkers alone
        hints = get_type_hints(kind if is_dataclass(kind) else kind.__init__)
    for hint in hints.values():
        if is_dataclass(hint):
            yield from with_parts(hint)


PUBLIC = {one for name in featinv_pl.__all__ if inspect.isclass(one := getattr(featinv_pl, name))}
PUBLIC |= {kind for group in ("model", "data", "callbacks") for one in own(group) for kind in with_parts(one)}


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.run])
def test_every_option_of_a_command_is_explained(name: str) -> None:
    silent = [action.option_strings or action.dest for action in collected(name)._actions if not action.help]
    assert not silent


@pytest.mark.parametrize("kind", sorted(PUBLIC, key=str))
def test_every_argument_of_a_class_is_explained(kind: type) -> None:
    explained: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        found = docstring_parser.parse(one.__doc__ or "").params
        explained |= {param.arg_name: param.description or "" for param in found if param.args[0] == "param"}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            assert explained.get(name), name
            if re.fullmatch(SIDES, name):
                assert "pixels" in explained[name], name
            if re.fullmatch(SHARES, name):
                assert "(0 to 1)" in explained[name], name
