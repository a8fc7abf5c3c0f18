"""Files at addresses, which fsspec opens; what it does not do is done here: several attempts, and an end to silence."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit, urlunsplit

from featinv_pl.errors import UserError

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")
READABLE = ("http", "https", "s3", "hf")
WAITS_S = (1.0, 5.0)  # before the second and the third attempt
SILENCE_S = 30.0  # for which a server may send nothing
CHUNK = 1 << 20
FINAL = (UserError, FileNotFoundError, PermissionError, ImportError)  # another attempt would end alike

Result = TypeVar("Result")


def is_remote(place: str) -> bool:
    """Whether a place is an address (or a command) rather than a folder."""
    return SCHEME.match(place) is not None and not Path(place).exists()


def below(address: str, name: str) -> str:
    """The address of a file in the folder at an address."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def attempted(read: Callable[[], Result]) -> Result:
    """Read, three times at most; each protocol has errors of its own."""
    for wait in WAITS_S:
        try:
            return read()
        except FINAL:
            raise
        except Exception:
            time.sleep(wait)
    return read()


@contextmanager
def open_address(address: str) -> Iterator[IO[bytes]]:
    """Open a file at an address, to be read from beginning to end; the hub's token is that of the environment."""
    import fsspec  # here, because few runs need it and it takes its time

    if address.lower().startswith("http"):
        import aiohttp

        silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
        plain = {"auto_decompress": False, "headers": {"Accept-Encoding": "identity"}}  # or a little becomes a lot
        server = fsspec.filesystem("http", client_kwargs={"timeout": silence, **plain})
        opened = server.open(address, "rb", block_size=0, size=1)  # a stream, whose true size is not asked for
    elif address.lower().startswith("hf"):
        opened = fsspec.filesystem("hf", skip_instance_cache=True).open(address, "rb", block_size=0)
    else:
        try:
            opened = fsspec.open(address, "rb", cache_type="readahead").open()
        except ImportError as error:
            raise ImportError("s3:// needs an extra: pip install 'featinv-pl[s3]'") from error
    with opened as file:
        yield file
