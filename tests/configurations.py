"""Configurations as a command would have them, without running it."""

from functools import cache
from typing import Any

from jsonargparse import capture_parser

from featinv_pl.cli import train


def effective_config(args: list[str]) -> str:
    """The whole configuration of a command line, as YAML."""
    parser = _parser()
    dumped: str = parser.dump(parser.parse_args(args), skip_none=False)
    return dumped


@cache
def _parser() -> Any:
    """The parser of all commands, which takes seconds to build."""
    return capture_parser(lambda: train([]))
