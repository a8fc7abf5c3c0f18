"""Files: those that anybody may have made are read bounded, and what is written appears complete or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from featinv_pl.errors import UserError

LARGEST = 1 << 26  # bytes; the largest that we write, the index of a shard of 10,000 samples, has a tenth
MOST_VALUES = 1_000_000  # of a YAML file, each counted as often as it is referred to
PARTIAL = ".partial"  # what an incomplete file or folder is called after its name
DEEPEST = 100  # levels of a YAML file; libyaml's composer overflows the stack at some ten thousand


def read_bytes(path: Path, option: str, advice: str) -> bytes:
    """Read a file whole.

    Args:
        path: The file.
        option: The option that named it, for errors.
        advice: What to do if it is no such file, for errors.

    Raises:
        UserError: It cannot be read, is larger than any such file, or no plain file: a pipe may never end.
    """
    try:
        if not path.exists():
            raise UserError(f"{option}: there is no file '{path}'. {advice}")
        if not path.is_file():
            raise OSError("it is no file")
        if path.stat().st_size > LARGEST:
            raise OSError(f"it has more than {LARGEST >> 20} MB")
        return path.read_bytes()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(path, option, advice, error) from error


def read_pipe(path: Path, option: str, advice: str) -> str:
    """Read a text that another command writes into a pipe, such as that of `<(...)`; see `read_bytes`."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise OSError(f"it has more than {LARGEST >> 20} MB")
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, option, advice, error) from error


def read_text(path: Path, option: str, advice: str) -> str:
    """Read a text in UTF-8; see `read_bytes`."""
    data = read_bytes(path, option, advice)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _damaged(path, option, advice, error) from error


def read_json(path: Path, option: str, advice: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: See `read_bytes`, as the rest.
        option: As above.
        advice: As above.

    Raises:
        UserError: It cannot be read, or is no JSON object.
    """
    data = read_bytes(path, option, advice)
    try:
        contents = json.loads(data)
        if not isinstance(contents, dict):
            raise ValueError("it is no JSON object")
        return contents
    except (ValueError, RecursionError) as error:
        raise _damaged(path, option, advice, error) from error


def read_yaml(path: Path, option: str, advice: str) -> Any:
    """Read a YAML file, which makes nothing but plain values; `~/` is the home folder.

    Args:
        path: See `read_bytes`, as the rest.
        option: As above.
        advice: As above.

    Raises:
        UserError: It cannot be read, or `parse_yaml` refuses it.
    """
    text = read_text(path, option, advice)
    try:
        return expand_home(parse_yaml(text, yaml.safe_load))
    except yaml.YAMLError as error:
        raise _damaged(path, option, advice, error) from error


def parse_yaml(text: str, load: Callable[[str], Any]) -> Any:
    """Parse YAML, but for what a few lines can unfold to: values without end, and more than fit into memory.

    Args:
        text: The YAML.
        load: What makes values of it.

    Raises:
        YAMLError: It is no YAML, or unfolds to too much.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it has more than {DEEPEST} levels")
    try:
        contents = load(text)
        _check_values(contents)
        return contents
    except (ValueError, TypeError, RecursionError) as error:  # such as of a day that no calendar has
        raise yaml.YAMLError(str(error)) from error


def expand_home(value: Any) -> Any:
    """Values in which texts that begin with `~/` begin with the home folder instead."""
    if isinstance(value, dict):
        return {key: expand_home(one) for key, one in value.items()}
    if isinstance(value, list):
        return [expand_home(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _check_values(contents: Any) -> None:
    """Refuse values that contain themselves, or billions of references."""
    sizes: dict[int, int | None] = {}

    def size(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = None
            sizes[id(value)] = 1 + sum(map(size, value.values() if isinstance(value, dict) else value))
        known = sizes[id(value)]
        if known is None:
            raise ValueError("a value contains itself")
        return known

    if size(contents) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES} values, counted as often as they are referred to")


def _damaged(path: Path, option: str, advice: str, error: Exception) -> UserError:
    reason = " ".join((str(error) or type(error).__name__).split())[:300]
    return UserError(f"{option}: '{path}' is damaged or no file of this kind ({reason}). {advice}")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Make a file or a folder that appears complete and flushed to the disk, or not at all.

    A file that is there is replaced; a folder that is there is an error, unless it is empty.

    Args:
        path: The file or folder; the folders above it are made.

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
    for part in (partial, *partial.rglob("*")):
        _flush(part)
    os.replace(partial, path)
    _flush(path.parent)  # or a loss of power may undo the renaming


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
