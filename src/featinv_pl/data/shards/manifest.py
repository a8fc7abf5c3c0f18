"""What lies beside the tars: a manifest for the set, and for each tar an index of its entries.

A tar knows nothing of what its members should hold, so one flipped byte of a feature map would pass
for a feature map. The index has a CRC-32 of each member, which notices every flipped byte, costs a
fraction of the time that reading takes, and can be checked sample by sample; SHA-256 of whole files
stands in the manifest, where `featinv-pl verify` and downloads compare it.
"""

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any, NotRequired, cast

from pydantic import TypeAdapter
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
PLAIN_NAME = re.compile(r"[\w-][\w.-]{0,199}")  # no folders, so that no shard lies outside its set


class Shard(TypedDict):
    """What the manifest knows of one tar."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


class Unreadable(TypedDict):
    """An image that is in no shard."""

    key: str
    reason: str


class Settings(TypedDict):
    """What determines the bytes of a set, apart from the networks."""

    images: int
    images_sha256: str
    """Of the keys and classes of all images in their order."""
    classes: NotRequired[dict[str, int]]
    """The classes that the set's images belong to, by name (such as the wnids of ImageNet-A), with their labels as
    the classifier counts them; -1 for a class that is not among the classifier's. Accuracy over the classes of the
    set is taken over these labels. Empty for images without classes; older sets do not have it."""
    preparation: str
    """How images became samples: crop, views, seed."""
    samples: int
    """Images times views, or fewer if the run was told so; unreadable ones included."""
    shard_size: int
    batch_size: int
    image_format: ImageFormat
    storage: Storage


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
    """Where a member lies in its tar: a header of one block, the data, zeros up to the next block."""

    offset: int
    size: int
    crc32: int
    """Of all three."""


class Entry(TypedDict):
    """One sample of a tar."""

    key: str
    members: dict[str, Member]
    """By suffix, such as `features.npy`, in the order of the tar."""


class Index(TypedDict):
    """All entries of one tar. It is written after the tar: its presence says that the tar is whole."""

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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, last of all: its presence says that the set is whole."""
    write_bytes(folder / MANIFEST, to_json(_sealed(manifest)))


def _sealed(manifest: Any) -> dict[str, Any]:
    """A manifest with the SHA-256 of all else in it: nothing but itself says that it is as it was written."""
    contents = {name: value for name, value in manifest.items() if name != SEAL}
    return {**contents, SEAL: seal(cast(Manifest, contents))}


def seal(manifest: Manifest) -> str:
    """The SHA-256 that stands in the file of a manifest: it tells a shard set from all others."""
    return hashlib.sha256(to_json(manifest)).hexdigest()


def read_manifest(folder: Path, option: str) -> Manifest:
    """Read a manifest; its shards are checked when they are opened.

    Args:
        folder: The shard set.
        option: The option that named the folder, for errors.
    """
    if not folder.is_dir():
        raise UserError(f"{option}: there is no folder '{folder}'. Check the path, or extract features first.")
    if not (folder / MANIFEST).is_file():
        saved = next((path for parent in folder.parents if (path := parent / CONFIGURATION).is_file()), None)
        command = "featinv-pl predict" + (f" --config {shlex.quote(str(saved))}" if saved else "")
        raise UserError(
            f"{option}: '{folder}' has no {MANIFEST}, so it is not a finished shard set. "
            f"Finish it with the command that began it ({command}), or give finished sets alone."
        )
    data = read_bytes(folder / MANIFEST, option, "Extract the features anew.")
    return parse_manifest(data, str(folder), option)


def parse_manifest(data: bytes, place: str, option: str) -> Manifest:
    """Read the bytes of a manifest.

    Args:
        data: The bytes.
        place: Folder or address of the set, for errors.
        option: The option that named it, for errors.
    """
    try:
        contents = json.loads(data)
        version = contents.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:  # checked first: another version may have other fields
            raise UserError(
                f"{option}: '{place}' has shard format {version}, and this version reads {FORMAT_VERSION}. "
                "Extract the features anew."
            )
        if data != to_json(_sealed(contents)):
            raise UserError(
                f"{option}: '{place}/{MANIFEST}' is damaged (it has changed since it was written). Copy it again, or "
                "extract the features anew."
            )
        manifest = TypeAdapter(Manifest).validate_python({n: value for n, value in contents.items() if n != SEAL})
    except UserError:
        raise
    except (ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{option}: '{place}/{MANIFEST}' is damaged ({reason}). Extract the features anew.") from error
    for shard in manifest["shards"]:
        if not PLAIN_NAME.fullmatch(shard["name"]):
            raise UserError(
                f"{option}: '{place}/{MANIFEST}' names the shard {shard['name'][:100]!r}, which is no plain file name. "
                "Do not use this set: it is damaged, or made to reach outside its folder."
            )
    names = {shard["name"] for shard in manifest["shards"]}
    if len(names) < len(manifest["shards"]) or any(shard["samples"] < 0 for shard in manifest["shards"]):
        raise UserError(
            f"{option}: '{place}/{MANIFEST}' names a shard twice, or less than no samples. Extract the features anew."
        )
    return manifest


def find_sets(name: str, folder: Path) -> dict[str, Path]:
    """Shard sets at or below a folder, by name of source.

    A folder of sets, such as that of a benchmark with many corruptions, gives `name/<path below>`. Unfinished
    sets are among them, so that they are refused instead of left out.
    """
    if not folder.is_dir():
        return {name: folder}
    below = sorted({path.parent for mark in (MANIFEST, BEGUN, "*.tar") for path in folder.rglob(mark)})
    if folder in below:
        return {name: folder}
    return {f"{name}/{path.relative_to(folder).as_posix()}": path for path in below} or {name: folder}
