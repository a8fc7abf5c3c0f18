"""Files: bounded reading of files from elsewhere, and atomic writing."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from featinv_pl.errors import UserError

LARGEST = 1 << 26  # bytes; the largest that we write, the index of a shard of 10,000 samples, has a tenth
PARTIAL = ".partial"  # what an incomplete file or folder is called after its name


def read_bytes(path: Path, option: str, advice: str) -> bytes:
    """Read a complete file; errors begin with `option`, which named it, and end with `advice`.

    Raises:
        UserError: It cannot be read, is larger than any such file, or is not a plain file: a pipe may never end.
    """
    if not path.exists():
        raise UserError(f"{option}: there is no file '{path}'. {advice}")
    with _explained(path, option, advice):
        if not path.is_file():
            raise OSError("it is not a file")
        if path.stat().st_size > LARGEST:
            raise OSError(f"it has more than {LARGEST >> 20} MB")
        return path.read_bytes()


def read_text(path: Path, option: str, advice: str) -> str:
    """Read a text in UTF-8; see `read_bytes`."""
    data = read_bytes(path, option, advice)
    with _explained(path, option, advice):
        return data.decode()


def read_json(path: Path, option: str, advice: str) -> dict[str, Any]:
    """Read a JSON object; see `read_bytes`."""
    data = read_bytes(path, option, advice)
    with _explained(path, option, advice):
        contents = json.loads(data)
        if not isinstance(contents, dict):
            raise ValueError("it is not a JSON object")
        return contents


def read_yaml(path: Path, option: str, advice: str) -> Any:
    """Read a YAML file, which makes nothing but plain values; see `read_bytes`."""
    text = read_text(path, option, advice)
    with _explained(path, option, advice):
        return yaml.safe_load(text)


@contextlib.contextmanager
def _explained(path: Path, option: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise UserError(f"{option}: '{path}' is damaged or of another kind ({reason}). {advice}") from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Make a file or a folder that appears complete and flushed to the disk, or not at all.

    A file that is there is replaced; a folder that is there is an error, unless it is empty.

    Yields:
        Where to write it: a new name beside `path`, which an interrupted run leaves behind and the next one replaces.

    Raises:
        OSError: The file system refuses; of a full disk, Python alone does not say whose file it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)  # a link that somebody has put there would be written through
    try:
        with named(path):
            yield partial
            publish(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk needs the room
            remove(partial)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as partial:
        partial.write_bytes(data)


def publish(partial: Path, path: Path) -> None:
    """Flush a complete file or folder to the disk, and then give it its name."""

    def flush(part: Path) -> None:
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    for part in (partial, *partial.rglob("*")):
        flush(part)
    os.replace(partial, path)
    flush(path.parent)  # or a loss of power may undo the renaming


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Give what the file system refuses the name of the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not str(error.filename or path).startswith(str(path)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
