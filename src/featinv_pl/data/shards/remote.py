"""Shard sets that lie elsewhere: complete files are fetched into a cache, checked, and read from there."""

import hashlib
import io
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock

from featinv_pl.data.addresses import CHUNK, attempted, below, open_address
from featinv_pl.data.shards.manifest import MANIFEST, one_line, parse_manifest
from featinv_pl.errors import UserError
from featinv_pl.files import LARGEST, atomic, write_bytes
from featinv_pl.masking import MASK, masked

READABLE = ("http", "https", "s3")
ALLOW_PIPE = "FEATINV_ALLOW_PIPE"


class RemoteSet:
    """A shard set at an address.

    What a server may send is bounded, and checked by its digest; processes that want the same file wait for each other.
    The place is `https://...`, `http://...`, `s3://...`, or `pipe:COMMAND`, which prints the file whose name takes the
    place of `{}`. Commands run only if the environment allows them: a configuration may be anybody's. Errors begin with
    `option`.
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

        def copy() -> str:
            found = hashlib.sha256()
            file.seek(0)
            file.truncate()
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

        try:
            return attempted(copy)
        except UserError:
            raise
        except Exception as error:  # each protocol has errors of its own
            reason = f"could not be fetched ({masked(one_line(error))})"
            raise self._error(f"has a '{name}' that {reason}. Check address and network.") from error

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
        with open_address(below(self.place, name)) as file:
            yield file

    def _error(self, text: str) -> UserError:
        return UserError(f"{self.option}: '{self.shown}' {text}")
