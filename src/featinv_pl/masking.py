"""Credentials in addresses: whoever reads a configuration, a log or an error message would have them."""

import re
from typing import Any

MASK = "***"
ADDRESS = re.compile(r"""(://)([^\s/?#'"]+@)?([^\s?#'"]*)([?#][^\s'"]*)?""")


def masked(settings: Any) -> Any:
    """Text, or settings that contain text, with user, password, query and fragment of each address masked."""
    if isinstance(settings, dict):
        return {masked(key): masked(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [masked(value) for value in settings]
    return ADDRESS.sub(_mask, settings) if isinstance(settings, str) else settings


def _mask(address: re.Match[str]) -> str:
    start, user, place, query = address.groups()
    return f"{start}{f'{MASK}@' if user else ''}{place}{query[0] + MASK if query else ''}"
