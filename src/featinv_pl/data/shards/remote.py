"""Shard sets that lie elsewhere: complete files are fetched into a cache, checked, and read from there."""

import hashlib
import io
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock

from featinv_pl.data.shards.manifest import MANIFEST, one_line, parse_manifest
from featinv_pl.errors import UserError
from featinv_pl.files import LARGEST, atomic, write_bytes
from featinv_pl.masking import MASK, masked

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")
READABLE = ("http", "https", "s3")
ALLOW_PIPE = "FEATINV_ALLOW_PIPE"
WAITS_S = (1.0, 5.0)  # before the second and the third attempt
SILENCE_S = 30.0  # for which a server may send nothing
CHUNK = 1 << 20


def is_remote(place: str) -> bool:
    """Whether a place is an address (or a command) rather than a folder."""
    return SCHEME.match(place) is not None and not Path(place).exists()


class RemoteSet:
    """A shard set at an address.

    fsspec opens the address; what it does not do is done here: bounds on what a server may send, digests, several
    attempts, and processes that wait for each other. The place is `https://...`, `http://...`, `s3://...`, or
    `pipe:COMMAND`, which prints the file whose name takes the place of `{}`. Commands run only if the environment
    allows them: a configuration may be anybody's. Errors begin with `option`.
    """

    def __init__(self, place: str, cache: Path, option: str) -> None:
        scheme = place.partition(":")[0].lower()
        self.place, self.option, self.shown = place, option, masked(place)
        if scheme == "pipe" and os.environ.get(ALLOW_PIPE) != "1":
            raise self._error(f"runs a command on this machine; set {ALLOW_PIPE}=1 in the environment if you trust it.")
        if scheme not in (*READABLE, "pipe") or "::" in place:
            raise self._error(f"is not a folder, and of addresses only {', '.join(READABLE)} are read.")
        if MASK in place:
            raise self._error("was saved without its credentials. Give the address again, with them.")
        file = io.BytesIO()
        self._copy(MANIFEST, file)
        manifest = file.getvalue()
        parse_manifest(manifest, self.shown, option)
        # Of every file that has been fetched; a set that is replaced at its address gets another.
        self.folder = cache.expanduser() / hashlib.sha256(manifest).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            write_bytes(self.folder / MANIFEST, manifest)

    def fetch(self, path: Path, sha256: str, size: int | None = None) -> None:
        """Fetch a file of this digest, and size where known, unless it is there, complete and checked."""
        if path.is_file():
            return
        with FileLock(path.with_name(f".{path.name}.lock")):  # processes that want the same file wait for the first
            if path.is_file():
                return
            with atomic(path) as partial, partial.open("wb") as file:
                if self._copy(path.name, file, size) != sha256:
                    raise self._error(f"has a '{path.name}' that its manifest does not describe. Copy it there again.")

    def _copy(self, name: str, file: IO[bytes], size: int | None = None) -> str:
        """Copy a file of the set into an open one, in several attempts if need be; its SHA-256."""
        most = LARGEST if size is None else size
        for wait in (*WAITS_S, None):
            found = hashlib.sha256()
            file.seek(0)
            file.truncate()
            try:
                with self._open(name) as source:
                    while chunk := source.read(CHUNK):
                        if file.tell() + len(chunk) > most:
                            told = "such a file may have" if size is None else "its manifest says"
                            raise self._error(f"has a '{name}' of more than the {most} bytes that {told}.")
                        found.update(chunk)
                        file.write(chunk)
                if size is not None and file.tell() < size:
                    raise OSError(f"it ended after {file.tell()} of {size} bytes")
                return found.hexdigest()
            except UserError:
                raise
            except Exception as error:  # each protocol has errors of its own
                if wait is None or isinstance(error, FileNotFoundError | PermissionError | ImportError):
                    reason = f"could not be fetched ({masked(one_line(error))})"
                    raise self._error(f"has a '{name}' that {reason}. Check address and network.") from error
                time.sleep(wait)
        raise AssertionError

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self.place.startswith("pipe:"):
            command = self.place.removeprefix("pipe:").replace("{}", shlex.quote(name))
            with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                yield process.stdout
            if process.returncode != 0:
                raise OSError(f"exit status {process.returncode} of: {command}")
            return
        import fsspec  # here, because few runs need it and it takes its time

        parts = urlsplit(self.place)
        address = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
        if address.lower().startswith("http"):
            import aiohttp

            silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
            plain = {"auto_decompress": False, "headers": {"Accept-Encoding": "identity"}}  # or a little becomes a lot
            server = fsspec.filesystem("http", client_kwargs={"timeout": silence, **plain})
            opened = server.open(address, "rb", block_size=0, size=1)  # a stream, whose true size is not asked for
        else:
            opened = fsspec.open(address, "rb", cache_type="readahead").open()
        with opened as file:
            yield file

    def _error(self, text: str) -> UserError:
        return UserError(f"{self.option}: '{self.shown}' {text}")
