"""Makes shard sets for the tests beside it, by the writer that extraction uses."""

from pathlib import Path

from featinv_pl.data.shards import FORMAT_VERSION, ImageFormat, Manifest, ShardSetWriter, write_manifest
from featinv_pl.types import Batch

OPTION = "--data.here"


def write_set(folder: Path, batch: Batch, shard_size: int = 100, image_format: ImageFormat = "png") -> Manifest:
    """Write all samples of a batch as one finished set."""
    writer = ShardSetWriter(folder, batch["source"][0], shard_size=shard_size, image_format=image_format)
    for index in range(len(batch["key"])):
        writer.add(batch, index)
    writer.finish_shard()
    manifest: Manifest = {
        "format_version": FORMAT_VERSION,
        "package_version": "0",
        "source": batch["source"][0],
        "provenance": {
            "backbone": "tiny",
            "backbone_digest": "b",
            "layer": "penultimate",
            "feature_shape": list(batch["features"].shape[1:]),
            "num_classes": batch["logits"].shape[1],
            "transform": "none",
            "autoencoder_digest": "a",
            "image_size": 32,
        },
        "shards": writer.shards,
    }
    write_manifest(folder, manifest)
    return manifest
