"""Checks a shard set against its manifest, to the last byte and the last value."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from featinv_pl.data.shards.manifest import find_sets
from featinv_pl.data.shards.reader import DamagedError, ShardSet
from featinv_pl.errors import UserError


def verify(folder: Path) -> bool:
    """Check the set in a folder, or all sets below it, and print the result.

    Returns:
        Whether nothing is damaged.
    """
    intact = True
    for path in find_sets("", folder).values():
        try:
            shards = ShardSet(path, "", "verify", on_error="skip")
        except UserError as error:  # the manifest itself
            print(f"{path}: damaged\n  {error}")
            intact = False
            continue
        problems, manifest = list(_problems(shards)), shards.manifest
        unreadable = f", {len(manifest['unreadable'])} unreadable images" if manifest["unreadable"] else ""
        state = f"{path}: {'damaged' if problems else 'complete'}: {len(manifest['shards'])} shards"
        print("\n  ".join([f"{state}, {manifest['samples']} samples{unreadable}", *problems]))
        intact = intact and not problems
    return intact


def _problems(shards: ShardSet) -> Iterator[str]:
    yield from sorted(set(shards.skipped))
    listed = {shard["name"] for shard in shards.manifest["shards"]}
    for path in sorted(shards.folder.glob("*.tar")):
        if path.name not in listed:
            yield f"'{path}' is not in the manifest. Move it elsewhere."
    number = 0
    for shard in shards.shards:
        path = shards.folder / shard["name"]
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                yield f"The shard '{path}' has changed since it was written: its SHA-256 is another."
        for sample in range(number, number + shard["samples"]):
            try:
                shards[sample]
            except DamagedError as error:
                yield str(error)
                if "The sample" not in str(error):  # the index: no sample of this shard can be found
                    break
        number += shard["samples"]
