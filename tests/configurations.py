"""Configurations as a command would have them, without running it."""

import json
from functools import cache
from typing import Any

from jsonargparse import capture_parser

from featinv_pl.cli import train


def effective_config(args: list[str]) -> dict[str, Any]:
    """The whole configuration that a command line amounts to."""
    parser = _parser()
    parsed = parser.parse_args(args)
    dumped = parser.dump(parsed, format="json", skip_none=False, skip_validation=True)
    whole: dict[str, dict[str, Any]] = json.loads(dumped)
    return whole[args[0]]


@cache
def _parser() -> Any:
    """The parser of all commands, which takes seconds to build."""
    return capture_parser(lambda: train([]))
