"""Credentials in addresses: whoever reads a configuration, a log or an error message would have them."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

MASK = "***"
ADDRESS = re.compile(r"""(:/+)([^\s/?#'"]+@)?([^\s?#'"]*)([?#][^\s'"]*)?""")  # a Path has lost one of the slashes


def masked(settings: Any) -> Any:
    """Text, or settings that contain text, with user, password, query and fragment of each address masked."""
    if isinstance(settings, Namespace):
        return type(settings)(**masked(vars(settings)))
    if isinstance(settings, dict):
        return {masked(key): masked(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return type(settings)(map(masked, settings))
    if isinstance(settings, str | Path):
        return type(settings)(ADDRESS.sub(_mask, str(settings)))
    return settings


def _mask(address: re.Match[str]) -> str:
    start, user, place, query = address.groups()
    return f"{start}{f'{MASK}@' if user else ''}{place}{query[0] + MASK if query else ''}"
