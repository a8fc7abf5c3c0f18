"""Tab completion: a script for bash that knows the commands, their options, and the names of classes."""

from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO
from typing import Any, Literal, NoReturn, get_args, get_origin

from featinv_pl.cli import train
from featinv_pl.commands import COMMANDS
from featinv_pl.mistakes import FAMILIES, OPTION, arguments, classes, own
from featinv_pl.options import Parser

# Bash takes `--option=value` for three words, where shtab's function expects two; `--option+=value` appends. Where
# there is no answer, bash completes files.
JOINED = """
_featinv_pl() {
  local index words=()
  for ((index = 0; index <= COMP_CWORD; index++)); do
    [[ ${COMP_WORDS[index]} == = ]] || words+=("${COMP_WORDS[index]%+}")
  done
  [[ ${COMP_WORDS[COMP_CWORD]} == = ]] && words+=("")
  COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
  _shtab_featinv_pl
}
complete -o default -F _featinv_pl featinv-pl"""


class _Options(Parser):
    """A parser that collects options, and ends the command that adds them before it does anything."""

    def parse_args(self, *_: Any) -> NoReturn:  # type: ignore[override]  # it only stops
        raise StopIteration


def script() -> str:
    """The script. It is made once, since the options of LightningCLI take seconds to list."""
    import shtab

    root = ArgumentParser("featinv-pl")
    commands = root.add_subparsers()
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.does, parents=[collected(name)], add_help=False)
    return f"{shtab.complete(root, 'bash')}\n{JOINED}"


def collected(name: str) -> ArgumentParser:
    """A parser with the options of a command."""
    does, run, example = COMMANDS[name]
    options = _Options(name, does, example)
    if run:
        with suppress(StopIteration):
            run(options, [])
    else:
        for option, values in dict(_of_lightning(name)).items():
            options.add_argument(option, choices=values or None)
    return options


def _of_lightning(name: str) -> Iterator[tuple[str, list[str]]]:
    """The options of one of Lightning's commands and those of our models and data modules, with their listed values."""
    shown = StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        train([name, "--help"])
    for option in OPTION.findall(shown.getvalue()):
        if option != "--help":
            yield option, _values(option.removesuffix(".help").lstrip("-"), None)
    for group in ("model", "data"):
        for kind in own(group):
            for argument, hint in arguments(kind).items():
                yield f"--{group}.{argument}", _values(argument, hint)


def _values(option: str, hint: Any) -> list[str]:
    family = FAMILIES.get(option.rpartition(".")[2])
    return [str(one) for one in get_args(hint)] if get_origin(hint) is Literal else classes(family) if family else []
