"""The files beside the tars: a manifest of the set, and for each tar an index of its entries.

A tar does not notice a flipped byte in its members. The index has a CRC-32 of each, which is checked sample by sample
in a fraction of the time of reading; the manifest has the SHA-256 of each file, for `featinv-pl verify` and downloads.
"""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import NonNegativeInt, StringConstraints, TypeAdapter
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.data.shards.samples import ImageFormat, Storage
from featinv_pl.errors import UserError
from featinv_pl.files import read_bytes, write_bytes
from featinv_pl.types import Provenance

MANIFEST = "manifest.json"
SEAL = "manifest_sha256"
FORMAT_VERSION = 2
BEGUN = "extraction.json"  # lies in a set until its manifest is written
CONFIGURATION = "predict.yaml"  # of the extraction, saved in its root folder
AGAIN = "Copy it again, or extract the features again."


class Shard(TypedDict):
    """One tar in the manifest."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w-][\w.-]{0,199}$")]  # no shard lies outside its set
    samples: NonNegativeInt
    bytes: int
    sha256: str
    index_sha256: str


class Unreadable(TypedDict):
    """An image that is in no shard."""

    key: str
    reason: str


class Settings(TypedDict):
    """The settings that determine the bytes of a set, apart from the networks."""

    images: int
    images_sha256: str  # of the keys and classes of all images in their order
    classes: NotRequired[dict[str, int]]
    """By name, with the classifier's labels, or -1 where it has none: accuracy over the set's classes is over these."""
    preparation: str  # of samples from images: crop, views, seed
    samples: int  # images times views, or fewer if the run was told so; unreadable ones included
    shard_size: int
    batch_size: int
    image_format: ImageFormat
    storage: Storage
    autoencoder_dtype: NotRequired[str]  # that it computed in, if not float32


class Manifest(TypedDict):
    """A shard set: what made it, and what it holds."""

    format_version: int
    package_version: str
    source: str
    provenance: Provenance
    settings: Settings
    samples: int
    unreadable: list[Unreadable]
    shards: list[Shard]


class Member(TypedDict):
    """Where a member lies in its tar, and the CRC-32 of its header of one block, its data and zeros to the next."""

    offset: int
    size: int
    crc32: int


class Entry(TypedDict):
    """One sample of a tar: its members by suffix, such as `features.npy`, in the order of the tar."""

    key: str
    members: dict[str, Member]


class Index(TypedDict):
    """All entries of one tar. It is written after the tar: its presence says that the tar is complete."""

    bytes: int
    sha256: str
    unreadable: list[Unreadable]
    entries: list[Entry]


INDEX = TypeAdapter(Index)


def index_path(shard: Path) -> Path:
    """Where the index of a tar lies."""
    return shard.with_suffix(".json")


def to_json(contents: Any) -> bytes:
    """The bytes in which a manifest is written."""
    return (json.dumps(contents, indent=2) + "\n").encode()


def seal(manifest: Any) -> str:
    """The SHA-256 of all else in a manifest, which tells a shard set from all others."""
    return hashlib.sha256(to_json({name: value for name, value in manifest.items() if name != SEAL})).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, last of all: its presence says that the set is complete."""
    write_bytes(folder / MANIFEST, to_json({**manifest, SEAL: seal(manifest)}))


def read_manifest(folder: Path, option: str) -> Manifest:
    """Read the manifest of a folder that an option named; its shards are checked when they are opened."""
    if not folder.is_dir():
        raise UserError(
            f"{option}: there is no folder '{folder}'. Check the path, or extract features first."
        ) from FileNotFoundError(folder)
    if not (folder / MANIFEST).is_file():
        saved = next((path for parent in folder.parents if (path := parent / CONFIGURATION).is_file()), None)
        command = "featinv-pl predict" + (f" --config {shlex.quote(str(saved))}" if saved else "")
        raise UserError(
            f"{option}: '{folder}' has no {MANIFEST}, so it is not a finished shard set. "
            f"Finish it with the command that began it ({command}), or give finished sets alone."
        )
    return parse_manifest(read_bytes(folder / MANIFEST, option, AGAIN), str(folder), option)


def parse_manifest(data: bytes, place: str, option: str) -> Manifest:
    """Read the bytes of a manifest from a folder or address that an option named."""
    try:
        contents = json.loads(data)
        if (found := contents.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:  # which may have other fields
            raise ValueError(f"it has shard format {found}, and this version reads {FORMAT_VERSION}")
        if data != to_json({**contents, SEAL: seal(contents)}):
            raise ValueError("it has changed since it was written")
        contents.pop(SEAL)
        manifest = TypeAdapter(Manifest).validate_python(contents)
        if len({shard["name"] for shard in manifest["shards"]}) < len(manifest["shards"]):
            raise ValueError("it names a shard twice")
        return manifest
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{option}: '{place}/{MANIFEST}' is damaged ({one_line(error)}). {AGAIN}") from error


def one_line(error: Exception) -> str:
    """The text of an error of another library, which may have many lines."""
    return " ".join((str(error) or type(error).__name__).split())[:300]


def find_sets(name: str, folder: Path) -> dict[str, Path]:
    """Sets at or below a folder by name, `name/<path below>` of several; unfinished ones too, to be refused."""
    below = sorted({path.parent for mark in (MANIFEST, BEGUN, "*.tar") for path in folder.rglob(mark)})
    if folder in below or not below:
        return {name: folder}
    return {f"{name}/{path.relative_to(folder).as_posix()}": path for path in below}
