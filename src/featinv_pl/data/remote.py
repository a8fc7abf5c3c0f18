"""Shard sets that lie elsewhere: whole files are fetched into a cache, checked, and read from there."""

import hashlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock

from featinv_pl.data.manifests import MANIFEST, PARTIAL, parse_manifest, write_file
from featinv_pl.errors import UserError

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")
READABLE = ("http", "https", "s3")
ATTEMPTS = 3
CHUNK = 1 << 20


class RemoteSet:
    """A shard set at an address.

    Args:
        place: `https://...`, `http://...`, `s3://...`, or `pipe:COMMAND`, which prints the file whose
            name takes the place of `{}`.
        cache: Where files are kept.
        option: The option that named the address, for errors.
        allow_pipe: Run commands.

    Attributes:
        folder: Holds the manifest, and every file that has been fetched. Its name is the digest of the
            manifest, so a set that is replaced at its address gets another folder.
    """

    def __init__(self, place: str, cache: Path, option: str, allow_pipe: bool = False) -> None:
        scheme = place.partition(":")[0].lower()
        if scheme == "pipe" and not allow_pipe:
            raise UserError(
                f"{option}: '{place}' runs a command on this machine. If you trust it, allow it with "
                "--data.allow_pipe=true."
            )
        if scheme not in (*READABLE, "pipe") or "::" in place:
            raise UserError(f"{option}: '{place}' is no folder, and of addresses only {', '.join(READABLE)} are read.")
        self.place, self.option = place, option
        with self._open(MANIFEST) as file:
            manifest = file.read()
        parse_manifest(manifest, place, option)
        self.folder = cache.expanduser() / hashlib.sha256(manifest).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            write_file(self.folder / MANIFEST, manifest)

    def fetch(self, path: Path, sha256: str) -> None:
        """Fetch a file of the set unless it is there. It has its name only when it is whole and checked."""
        if path.is_file():
            return
        # Processes that want the same file wait for the first.
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                self._download(path, sha256)

    def _download(self, path: Path, sha256: str) -> None:
        partial, found = path.with_name(path.name + PARTIAL), hashlib.sha256()
        with self._open(path.name) as file, partial.open("wb") as copy:
            while chunk := file.read(CHUNK):
                found.update(chunk)
                copy.write(chunk)
        if found.hexdigest() != sha256:
            partial.unlink()
            raise UserError(
                f"{self.option}: '{path.name}' of '{self.place}' is not the file that its manifest describes: its "
                f"SHA-256 is {found.hexdigest()[:12]} instead of {sha256[:12]}. Copy it there again."
            )
        os.replace(partial, path)

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        import fsspec  # here, because few runs need it and it takes its time

        try:
            if self.place.startswith("pipe:"):
                command = self.place.removeprefix("pipe:").replace("{}", shlex.quote(name))
                with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
                    assert process.stdout is not None
                    yield process.stdout
                if process.returncode != 0:
                    raise OSError(f"exit status {process.returncode} of: {command}")
            else:
                with fsspec.open(f"{self.place.rstrip('/')}/{name}", "rb", cache_type="readahead") as file:
                    yield file
        except ImportError as error:
            raise UserError(f"{self.option}: '{self.place}' needs another package: {error}.") from error
        except Exception as error:  # each protocol has errors of its own
            if isinstance(error, UserError):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{self.option}: '{name}' could not be fetched from '{self.place}' ({reason}). Check address and "
                "network; what has been fetched is kept."
            ) from error


def is_remote(place: str) -> bool:
    """Whether a place is an address (or a command) rather than a folder."""
    return SCHEME.match(place) is not None and not Path(place).exists()
