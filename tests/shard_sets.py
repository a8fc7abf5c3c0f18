"""Makes shard sets for the tests beside it, by the writer that extraction uses."""

import hashlib
import io
import json
import zlib
from pathlib import Path
from tarfile import BLOCKSIZE, TarFile, TarInfo
from typing import Any

from featinv_pl.data.shards.manifest import (
    INDEX,
    MANIFEST,
    Manifest,
    Settings,
    index_path,
    read_manifest,
    write_manifest,
)
from featinv_pl.data.shards.samples import ImageFormat, Storage
from featinv_pl.data.shards.writer import ShardSetWriter
from featinv_pl.types import Batch, Provenance

OPTION = "--data.here"


def settings_of(
    batch: Batch, shard_size: int = 100, image_format: ImageFormat = "png", storage: Storage = "float16"
) -> Settings:
    size = len(batch["key"])
    return {
        "images": size,
        "images_sha256": "0",
        "preparation": "none",
        "samples": size,
        "shard_size": shard_size,
        "batch_size": size,
        "image_format": image_format,
        "storage": storage,
    }


def provenance_of(batch: Batch) -> Provenance:
    return {
        "backbone": "tiny",
        "backbone_digest": "b",
        "layer": "penultimate",
        "feature_shape": list(batch["features"].shape[1:]),
        "num_classes": batch["logits"].shape[1],
        "transform": "none",
        "autoencoder_digest": "a",
        "image_size": batch["images"].shape[-1],
        "attack": "",
    }


def write_set(
    folder: Path,
    batch: Batch,
    shard_size: int = 100,
    image_format: ImageFormat = "png",
    storage: Storage = "float16",
) -> Manifest:
    """Write all samples of a batch as one finished set."""
    settings = settings_of(batch, shard_size, image_format, storage)
    writer = ShardSetWriter(folder, batch["source"][0], settings, provenance_of(batch))
    writer.begin()
    writer.add(batch)
    writer.flush()
    writer.finish()
    writer.close()
    return read_manifest(folder, OPTION)


def flip(path: Path, offset: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def replace_member(folder: Path, number: int, suffix: str, data: bytes | None) -> None:
    """Replace (or take out) one member of a sample in a set of one shard; tar, index and manifest agree."""
    manifest = json.loads((folder / MANIFEST).read_text())
    path = folder / manifest["shards"][0]["name"]
    with TarFile.open(path) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    name = f"{number:09d}.{suffix}"
    assert name in contents
    if data is None:
        del contents[name]
    else:
        contents[name] = data
    with TarFile.open(path, "w") as tar:
        for member_name, content in contents.items():
            info = TarInfo(member_name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    rewrite_index(path)
    _agree(folder, manifest)


def rewrite_index(path: Path) -> None:
    """Make the index of a tar anew from what is there."""
    entries: dict[str, dict[str, Any]] = {}
    data = path.read_bytes()
    with TarFile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            end = member.offset_data + -(-member.size // BLOCKSIZE) * BLOCKSIZE
            checksum = zlib.crc32(data[member.offset : end])
            spans = entries.setdefault(key, {})
            spans[suffix] = {"offset": member.offset, "size": member.size, "crc32": checksum}
    index = INDEX.validate_json(index_path(path).read_bytes())
    index |= {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "entries": [{"key": key, "members": members} for key, members in entries.items()],
    }
    index_path(path).write_text(json.dumps(index))


def _agree(folder: Path, manifest: Any) -> None:
    shard = manifest["shards"][0]
    path = folder / shard["name"]
    shard["bytes"], shard["sha256"] = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    shard["index_sha256"] = hashlib.sha256(index_path(path).read_bytes()).hexdigest()
    write_manifest(folder, manifest)
