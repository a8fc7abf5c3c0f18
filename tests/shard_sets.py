"""Makes shard sets for the tests beside it, by the writer that extraction uses."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from tarfile import TarFile

from featinv_pl.data.shards.manifest import Manifest, Settings, index_path, read_manifest, write_manifest
from featinv_pl.data.shards.samples import ImageFormat, Storage
from featinv_pl.data.shards.writer import ShardFile, ShardSetWriter
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


def write_set(folder: Path, batch: Batch, shard_size: int = 100) -> Manifest:
    """Write all samples of a batch as one finished set."""
    writer = ShardSetWriter(folder, batch["source"][0], settings_of(batch, shard_size), provenance_of(batch))
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


def rewrite(path: Path, replaced: Callable[[str, bytes], bytes | None]) -> None:
    """Write a tar and its index again, with other contents of its members, by name; None leaves one out."""
    entries: dict[str, dict[str, bytes]] = {}
    with TarFile.open(path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            data = replaced(member.name, tar.extractfile(member).read())  # type: ignore[union-attr]
            entries.setdefault(key, {}).update({} if data is None else {suffix: data})
    file = ShardFile(path)
    for key, members in entries.items():
        file.add(key, members)
    file.finish()


def replace_member(folder: Path, number: int, suffix: str, data: bytes | None) -> None:
    """Replace (or take out) one member of a sample in a set of one shard; tar, index and manifest agree."""
    manifest = read_manifest(folder, OPTION)
    (shard,) = manifest["shards"]
    path = folder / shard["name"]
    rewrite(path, lambda name, content: data if name == f"{number:09d}.{suffix}" else content)
    shard["bytes"], shard["sha256"] = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    shard["index_sha256"] = hashlib.sha256(index_path(path).read_bytes()).hexdigest()
    write_manifest(folder, manifest)
