"""Shard sets that lie elsewhere: whole files are fetched into a cache, checked, and read from there."""

import errno
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
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock

from featinv_pl.data.shards.manifest import MANIFEST, parse_manifest
from featinv_pl.errors import UserError
from featinv_pl.files import LARGEST, atomic, write_bytes
from featinv_pl.masking import MASK, masked

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")
READABLE = ("http", "https", "s3")
ALLOW_PIPE = "FEATINV_ALLOW_PIPE"
WAITS_S = (1.0, 5.0)  # before the second and the third attempt
SILENCE_S = 30.0  # for which a server may send nothing
CHUNK = 1 << 20


class RemoteSet:
    """A shard set at an address.

    Args:
        place: `https://...`, `http://...`, `s3://...`, or `pipe:COMMAND`, which prints the file whose
            name takes the place of `{}`. Commands run only if the environment allows them: a
            configuration may be anybody's.
        cache: Where files are kept.
        option: The option that named the address, for errors.

    Attributes:
        folder: Holds the manifest, and every file that has been fetched. Its name is the digest of the
            manifest, so a set that is replaced at its address gets another folder.
    """

    def __init__(self, place: str, cache: Path, option: str) -> None:
        scheme = place.partition(":")[0].lower()
        if scheme == "pipe" and os.environ.get(ALLOW_PIPE) != "1":
            raise UserError(
                f"{option}: '{masked(place)}' runs a command on this machine. If you trust it, allow it in the "
                f"environment: {ALLOW_PIPE}=1."
            )
        if scheme not in (*READABLE, "pipe") or "::" in place:
            raise UserError(
                f"{option}: '{masked(place)}' is no folder, and of addresses only {', '.join(READABLE)} are read."
            )
        if MASK in place:
            raise UserError(
                f"{option}: '{place}' was saved without its credentials. Give the address again, with them: "
                f"{option}=ADDRESS."
            )
        self.place, self.option = place, option
        file = io.BytesIO()
        self._copy(MANIFEST, file)
        manifest = file.getvalue()
        parse_manifest(manifest, masked(place), option)
        self.folder = cache.expanduser() / hashlib.sha256(manifest).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            write_bytes(self.folder / MANIFEST, manifest)

    def fetch(self, path: Path, sha256: str, size: int | None = None) -> None:
        """Fetch a file of the set unless it is there. It has its name only when it is whole and checked.

        Args:
            path: Where to; its name is that of the file.
            sha256: Its digest.
            size: Its bytes, where they are known.
        """
        if path.is_file():
            return
        # Processes that want the same file wait for the first.
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                self._download(path, sha256, size)

    def _download(self, path: Path, sha256: str, size: int | None) -> None:
        with atomic(path) as partial:
            with partial.open("wb") as file:
                found = self._copy(path.name, file, size)
            if found != sha256:
                raise UserError(
                    f"{self.option}: '{path.name}' of '{masked(self.place)}' is not the file that its manifest "
                    f"describes: its SHA-256 is {found[:12]} instead of {sha256[:12]}. Copy it there again."
                )

    def _copy(self, name: str, file: IO[bytes], size: int | None = None) -> str:
        """Copy a file of the set into an open one, in several attempts if need be.

        Returns:
            Its SHA-256.

        Raises:
            UserError: It cannot be fetched, or is larger than it may be.
        """
        for wait in (*WAITS_S, None):
            try:
                return self._attempt(name, file, size)
            except UserError:
                raise
            except ImportError as error:
                raise UserError(f"{self.option}: '{masked(self.place)}' needs another package: {error}.") from error
            except Exception as error:  # each protocol has errors of its own
                if wait is None or _is_final(error):
                    reason = masked((str(error) or type(error).__name__).splitlines()[0])
                    raise UserError(
                        f"{self.option}: '{name}' could not be fetched from '{masked(self.place)}' ({reason}). Check "
                        "address and network; what has been fetched is kept."
                    ) from error
                time.sleep(wait)
        raise AssertionError

    def _attempt(self, name: str, file: IO[bytes], size: int | None) -> str:
        found, most = hashlib.sha256(), LARGEST if size is None else size
        file.seek(0)
        file.truncate()
        with self._open(name) as source:
            while chunk := source.read(CHUNK):
                if file.tell() + len(chunk) > most:
                    raise UserError(
                        f"{self.option}: '{name}' of '{masked(self.place)}' has more than the {most} bytes that "
                        f"{'such a file may have' if size is None else 'its manifest says'}. Copy it there again."
                    )
                found.update(chunk)
                file.write(chunk)
        if size is not None and file.tell() < size:
            raise OSError(f"it ended after {file.tell()} of {size} bytes")
        return found.hexdigest()

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self.place.startswith("pipe:"):
            command = self.place.removeprefix("pipe:").replace("{}", shlex.quote(name))
            with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                yield process.stdout
            if process.returncode != 0:
                raise OSError(f"exit status {process.returncode} of: {command}")
        else:
            parts = urlsplit(self.place)
            address = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
            with _opened(address) as file:
                yield file


def _opened(address: str) -> Any:
    """A file at an address, to be read from its beginning to its end."""
    import fsspec  # here, because few runs need it and it takes its time

    if not address.lower().startswith("http"):
        return fsspec.open(address, "rb", cache_type="readahead").open()
    import aiohttp

    silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    plain = {"auto_decompress": False, "headers": {"Accept-Encoding": "identity"}}  # or a little may become a lot
    server = fsspec.filesystem("http", client_kwargs={"timeout": silence, **plain})
    return server.open(address, "rb", block_size=0, size=1)  # a stream, whose true size is not asked for before


def _is_final(error: Exception) -> bool:
    """Whether another attempt would end as this one."""
    status = getattr(error, "status", None)  # of HTTP
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FileNotFoundError | PermissionError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    )


def is_remote(place: str) -> bool:
    """Whether a place is an address (or a command) rather than a folder."""
    return SCHEME.match(place) is not None and not Path(place).exists()
