"""Reading a shard set by sample number, and checking it to the last byte and the last value.

webdataset reads these tars too, but as a stream that stops silently at a damaged header, and in an order that is not
repeatable across workers. Reading by offset is ten times faster, and exact resumption needs any sample at any time.
"""

import hashlib
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import FileIO
from itertools import accumulate
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, Literal, cast

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from featinv_pl.bars import style
from featinv_pl.data.shards.manifest import AGAIN, INDEX, Entry, Shard, find_sets, index_path, one_line, read_manifest
from featinv_pl.data.shards.remote import RemoteSet
from featinv_pl.data.shards.samples import IMAGES, Sample, collate_samples, decode, widen
from featinv_pl.errors import UserError
from featinv_pl.files import read_bytes
from featinv_pl.sampling.noise import Draws
from featinv_pl.types import Batch

OnError = Literal["raise", "skip"]
RECENT = 24  # shards that stay open, more than training shuffles at once; the index of 1000 entries takes 2 MB
# Of a damaged or hostile entry, the standard library's and Pillow's readers raise any of these.
DAMAGE = (OSError, ValueError, KeyError, TypeError, IndexError, ArithmeticError, RuntimeError, SyntaxError)


class DamagedError(UserError):
    """A shard, or a sample of one, is not as it was written."""


class ShardSet(Dataset[Sample]):
    """A shard set, by sample number.

    Args:
        folder: With a manifest.
        source: Its name in batches and scores.
        option: What named the folder, which errors begin with.
        with_images: Whether samples have their images, which take most of the time.
        on_error: At damage, raise, or skip the shard or sample.
        remote: Where shards are fetched from that are not in the folder.

    Attributes:
        shards: Those that can be read.
        skipped: Why others cannot, one line for each of their samples.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        option: str,
        with_images: bool = True,
        on_error: OnError = "raise",
        remote: RemoteSet | None = None,
    ) -> None:
        self.folder, self.source, self.option, self.with_images = folder, source, option, with_images
        self.on_error, self.remote = on_error, remote
        self.manifest = read_manifest(folder, option)
        self.shards: list[Shard] = []
        self.skipped: list[str] = []
        self._latent_shape: tuple[int, ...] | None = None
        for shard in self.manifest["shards"]:
            try:
                if remote is None:
                    self._check_files(shard)
                self.shards.append(shard)
            except DamagedError as error:
                if on_error == "raise":
                    raise
                self.skipped += [f"{error} (a whole shard)"] * shard["samples"]
        self.shard_sizes = [shard["samples"] for shard in self.shards]
        self._ends = list(accumulate(self.shard_sizes))

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def __getitem__(self, number: int) -> Sample:
        return widen(self.stored(number))

    def stored(self, number: int) -> Sample:
        """Read one sample, in half precision and bytes, or raise DamagedError if it is not as it was written."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        position = bisect_right(self._ends, number)
        shard = self.shards[position]
        path, made_by = self.folder / shard["name"], self.manifest["provenance"]
        if self.remote is not None:
            self.remote.fetch(index_path(path), shard["index_sha256"])
            self.remote.fetch(path, shard["sha256"], shard["bytes"])
        entries = _read_index(path, shard["index_sha256"], shard["samples"])
        entry = entries[number - (self._ends[position] - shard["samples"])]
        try:
            members = _read(path, shard, entry, self.with_images)
            image_size = made_by["image_size"] if self.with_images else None
            sample = decode(members, self.manifest["settings"]["storage"], image_size)
            self._latent_shape = self._latent_shape or sample["moments"].shape
            shapes = {"features": made_by["feature_shape"], "logits": [made_by["num_classes"]]}
            for name, shape in (shapes | {"moments": [*self._latent_shape]}).items():
                if (found := [*cast(Any, sample)[name].shape]) != shape:
                    raise ValueError(f"{name} of shape {found} instead of {shape}")
        except DAMAGE as error:
            reason = f"no member {error}" if isinstance(error, KeyError) else one_line(error)
            what = f"The sample '{entry['key']}' of the shard '{path}' is damaged: {reason}."
            raise DamagedError(f"{what} {AGAIN} Or leave damaged samples out with `on_error`: skip.") from error
        sample["source"] = self.source
        return sample

    def _check_files(self, shard: Shard) -> None:
        path = self.folder / shard["name"]
        for file in (path, index_path(path)):
            if not file.is_file():
                raise DamagedError(f"{self.option}: '{file}' is missing. {AGAIN}")
        if (size := path.stat().st_size) != shard["bytes"]:
            raise DamagedError(f"{self.option}: '{path}' has {size} of {shard['bytes']} bytes. {AGAIN}")

    def problems(self) -> Iterator[str]:
        """Every difference between the files and the manifest, one line for each; the set is one that skips."""
        yield from sorted(set(self.skipped))
        listed = {shard["name"] for shard in self.manifest["shards"]}
        for path in sorted(self.folder.glob("*.tar")):
            if path.name not in listed:
                yield f"'{path}' is not in the manifest. Move it elsewhere."
        for shard, end in tqdm([*zip(self.shards, self._ends, strict=True)], **style(f"{self.folder}", "shard")):
            path = self.folder / shard["name"]
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    yield f"The shard '{path}' has changed since it was written: its SHA-256 is another."
            for sample in range(end - shard["samples"], end):
                try:
                    self.stored(sample)
                except DamagedError as error:
                    yield str(error)
                    if "The sample" not in str(error):  # the index: no sample of this shard can be found
                        break


class BatchReader(Dataset[Batch]):
    """Batches as they are stored, by the list of their samples; one that skips some says which (`skipped`).

    With a seed and a number of timesteps, batches hold what a training step draws; number `epoch * len(shards) + n` is
    sample n in that epoch.
    """

    def __init__(self, shards: ShardSet, draws: tuple[int, int] | None = None) -> None:
        self.shards, self.draws = shards, draws

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        samples, skipped = [], []
        for number in numbers:
            try:
                samples.append(self.shards.stored(number % len(self.shards)))
            except DamagedError as error:
                if self.shards.on_error == "raise":
                    raise
                skipped.append(str(error))
        if not samples:
            raise DamagedError(f"All {len(skipped)} samples of a batch are damaged, such as this: {skipped[0]}")
        batch = collate_samples(samples)
        if skipped:
            batch["skipped"] = skipped
        if self.draws is not None:
            drawn = self.draws[0], numbers[0] // len(self.shards), self.draws[1]
            channels, *grid = batch["moments"].shape[1:]
            batch["noise"], batch["timesteps"], batch["chances"] = Draws(*drawn)(batch["key"], (channels // 2, *grid))
            batch["drawn"] = drawn
        return batch


def verify(folder: Path) -> bool:
    """Check the set in a folder, or all sets below it, print the result, and tell whether nothing is damaged."""
    intact = True
    for path in find_sets("", folder).values():
        try:
            shards = ShardSet(path, "", "verify", on_error="skip")
        except UserError as error:  # the manifest itself
            print(f"{path}: damaged\n  {error}")
            intact = False
            continue
        problems, manifest = list(shards.problems()), shards.manifest
        unreadable = f", {len(manifest['unreadable'])} unreadable images" if manifest["unreadable"] else ""
        state = f"{path}: {'damaged' if problems else 'complete'}: {len(manifest['shards'])} shards"
        print("\n  ".join([f"{state}, {manifest['samples']} samples{unreadable}", *problems]))
        intact = intact and not problems
    return intact


@lru_cache(maxsize=RECENT)
def _read_index(shard: Path, sha256: str, samples: int) -> list[Entry]:
    path = index_path(shard)
    data = read_bytes(path, "index", AGAIN)
    try:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("it has changed since it was written")
        entries = INDEX.validate_json(data)["entries"]
        if len(entries) != samples:
            raise ValueError(f"it has {len(entries)} samples, and its manifest says {samples}")
        return entries
    except ValueError as error:
        raise DamagedError(f"The index '{path}' is damaged: {one_line(error)}. {AGAIN}") from error


class OpenShard(FileIO):
    """A file that closes when nobody refers to it any more."""

    def __del__(self) -> None:
        self.close()


@lru_cache(maxsize=RECENT)
def _open(path: Path, sha256: str) -> OpenShard:
    """A shard, which stays open while it is among the last that were read: on a network file system, opening waits.

    `sha256` tells it from another that took its place. It is read by position, so forks of this process may share it.
    """
    return OpenShard(path)


def _read(path: Path, shard: Shard, entry: Entry, with_images: bool) -> dict[str, memoryview]:
    spans = {}
    for suffix, member in entry["members"].items():
        if with_images or suffix not in IMAGES:
            spans[suffix] = member["offset"], member["offset"] + BLOCKSIZE * (1 - -member["size"] // BLOCKSIZE)
    start, end = min(first for first, _ in spans.values()), max(last for _, last in spans.values())
    if not 0 <= start < end <= shard["bytes"]:
        raise ValueError("it would lie outside the shard")
    data = np.empty(end - start, np.uint8).data
    file = _open(path, shard["sha256"])  # referred to until it is read: another thread's opening may drop it meanwhile
    if os.preadv(file.fileno(), [data], start) != len(data):
        raise ValueError("the shard ends before it")
    contents = {}
    for suffix, (first, last) in spans.items():
        member, block = entry["members"][suffix], data[first - start : last - start]
        if zlib.crc32(block) != member["crc32"]:
            raise ValueError(f"its member '{suffix}' has changed since it was written")
        contents[suffix] = block[BLOCKSIZE : BLOCKSIZE + member["size"]]
    return contents
