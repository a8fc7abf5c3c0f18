"""Writing a shard set, which can be interrupted at any moment and resumes where it stopped.

The samples of a source are numbered, and shard n holds those from n * shard_size on, whoever computes it. Complete
shards are the unit of work: ranks divide those that are missing, and a batch never reaches across two shards, so that
the bytes of a shard depend neither on the number of processes nor on what was computed before.
"""

import contextlib
import hashlib
import json
import tarfile
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from featinv_pl.data.shards import manifest as made
from featinv_pl.data.shards.manifest import (
    BEGUN,
    INDEX,
    MANIFEST,
    Index,
    Member,
    Settings,
    Shard,
    Unreadable,
    index_path,
)
from featinv_pl.data.shards.samples import encode, prepare
from featinv_pl.errors import UserError
from featinv_pl.files import PARTIAL, named, publish, read_json, write_bytes
from featinv_pl.types import Batch, Provenance

ENCODERS = 2  # threads; compressing an image takes about as long as a GPU takes for its features
BATCHES_IN_FLIGHT = 2
BLOCK = tarfile.BLOCKSIZE


class ShardFile:
    """A tar in progress, which gets its path and its index when it is complete; webdataset's writer makes no index."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + PARTIAL)
        self.index: Index = {"bytes": 0, "sha256": "", "unreadable": [], "entries": []}
        self._file = self.partial.open("wb")
        self._sha256 = hashlib.sha256()

    def add(self, key: str, members: dict[str, bytes]) -> int:
        """Append an entry; the bytes that it takes."""
        start = self._file.tell()
        places: dict[str, Member] = {}
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size, info.mode, info.uname, info.gname = len(data), 0o444, "featinv", "featinv"
            block = info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
            places[suffix] = {"offset": self._file.tell(), "size": len(data), "crc32": zlib.crc32(block)}
            self._write(block)
        self.index["entries"].append({"key": key, "members": places})
        return self._file.tell() - start

    def _write(self, data: bytes) -> None:
        with named(self.path):
            self._file.write(data)
        self._sha256.update(data)

    def finish(self) -> None:
        """Give the tar its name, and then write its index."""
        self._write(bytes(2 * BLOCK))  # the end of a tar
        self.index["bytes"], self.index["sha256"] = self._file.tell(), self._sha256.hexdigest()
        with named(self.path):
            self._file.close()
            publish(self.partial, self.path)
        write_bytes(index_path(self.path), json.dumps(self.index).encode())

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which refuses again what was not flushed yet
            self._file.close()
        self.partial.unlink(missing_ok=True)


class ShardSetWriter:
    """Writes one process's share of a source's set, and resumes where an earlier run has stopped.

    Settings and networks (`provenance`) determine the bytes; a set of others is refused. A set that was complete before
    is `finished`; `missing` are the samples of the shards that are not there yet, shard by shard, and `share` those of
    this rank. A larger share of unreadable images than `max_bad_fraction` is an error.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        settings: Settings,
        provenance: Provenance,
        rank: int = 0,
        world_size: int = 1,
        max_bad_fraction: float = 0.0,
    ) -> None:
        self.folder, self.source, self.settings, self.provenance = folder, source, settings, provenance
        self.max_bad_fraction = max_bad_fraction
        self._begun: Any = {"settings": settings, "provenance": provenance}
        self.finished = self._is_finished()
        ranges = [] if self.finished else shard_ranges(settings)
        complete = {samples: _unreadable(self._path(number)) for number, samples in enumerate(ranges)}
        self.unreadable = sum(count or 0 for count in complete.values())
        self.missing = [samples for samples, count in complete.items() if count is None]
        self.share = self.missing[rank::world_size]
        self.bytes_written = self.samples_written = 0
        self._numbers = iter([number for samples in self.share for number in samples])
        self._ends = {samples[-1] for samples in self.share}
        self._encoders = ThreadPoolExecutor(ENCODERS)
        self._in_flight: deque[tuple[Unreadable, Future[dict[str, bytes]] | None]] = deque()
        self._shard: ShardFile | None = None

    def _is_finished(self) -> bool:
        finished, begun = (self.folder / MANIFEST).is_file(), self.folder / BEGUN
        advice = "Choose another folder, or remove it first."
        if not finished and not begun.is_file():
            if any(self.folder.glob("*.tar")):
                raise UserError(f"`folder`: '{self.folder}' holds tars, and no {BEGUN} says what they are. {advice}")
            return False
        theirs: Any = made.read_manifest(self.folder, "`folder`") if finished else read_json(begun, "`folder`", advice)
        different = [
            f"{name}: {str(theirs[part].get(name))[:60]} there, {str(value)[:60]} here"
            for part, values in self._begun.items()
            for name, value in values.items()
            if theirs[part].get(name) != value
        ]
        if different:
            raise UserError(
                f"`folder`: '{self.folder}' already holds {'a finished' if finished else 'part of a'} shard set, made "
                f"with other settings ({'; '.join(different)}), which is left as it is. Use those settings. {advice}"
            )
        return finished

    def begin(self) -> None:
        """Note the settings, and remove what an interrupted run has left half-written. For one rank alone."""
        if not self.finished:
            for partial in self.folder.glob(f"*{PARTIAL}"):
                partial.unlink()
            write_bytes(self.folder / BEGUN, made.to_json(self._begun))

    def add(self, batch: Batch) -> None:
        """Take in the next batch of this rank's share; threads compress images while networks compute the next.

        They get arrays: torch's operations start threads of their own, which fail in threads of a forked process.
        """
        entries = prepare(batch, self.settings["storage"], self.settings["image_format"])
        while len(self._in_flight) > (BATCHES_IN_FLIGHT - 1) * self.settings["batch_size"]:
            self._write_next()
        reasons = batch.get("unreadable") or [""] * len(batch["key"])
        for key, reason, entry in zip(batch["key"], reasons, entries, strict=True):
            members = None if reason else self._encoders.submit(encode, entry)
            self._in_flight.append(({"key": key, "reason": reason}, members))

    @property
    def bytes_per_sample(self) -> float:
        return self.bytes_written / max(self.samples_written, 1)

    def flush(self) -> None:
        while self._in_flight:
            self._write_next()

    def _write_next(self) -> None:
        (image, members), number = self._in_flight.popleft(), next(self._numbers)
        if self._shard is None:
            self._shard = ShardFile(self._path(number // self.settings["shard_size"]))
        if members is None:
            self._shard.index["unreadable"].append(image)
            self.unreadable += 1
            self._check_unreadable(image, self.unreadable)
        else:
            self.bytes_written += self._shard.add(f"{number:09d}", members.result())
            self.samples_written += 1
        if number in self._ends:
            self._shard.finish()
            self._shard = None

    def _check_unreadable(self, last: Unreadable, count: int) -> None:
        if count > self.max_bad_fraction * self.settings["samples"]:
            raise UserError(
                f"`max_bad_fraction`: {count} of {self.settings['samples']} images cannot be read, the last of them "
                f"'{last['key']}' ({last['reason']}). Repair or remove them, or allow more; complete shards are kept."
            )

    def close(self) -> None:
        self._encoders.shutdown(wait=False, cancel_futures=True)
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None

    def finish(self) -> None:
        """Write the manifest, when all ranks have written their shards. For one rank alone."""
        shards: list[Shard] = []
        unreadable: list[Unreadable] = []
        for path in map(self._path, range(len(shard_ranges(self.settings)))):
            data = index_path(path).read_bytes()
            index = INDEX.validate_json(data)
            unreadable += index["unreadable"]
            sums: Any = {"sha256": index["sha256"], "index_sha256": hashlib.sha256(data).hexdigest()}
            counts: Any = {"samples": len(index["entries"]), "bytes": index["bytes"]}
            shards.append(cast(Shard, {"name": path.name, **counts, **sums}))
        if unreadable:
            self._check_unreadable(unreadable[-1], len(unreadable))
        manifest: made.Manifest = {
            "format_version": made.FORMAT_VERSION,
            "package_version": version("featinv-pl"),
            "source": self.source,
            "provenance": self.provenance,
            "settings": self.settings,
            "samples": sum(shard["samples"] for shard in shards),
            "unreadable": unreadable,
            "shards": shards,
        }
        made.write_manifest(self.folder, manifest)
        (self.folder / BEGUN).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.source.replace('/', '-')}-{number:05d}.tar"


def shard_ranges(settings: Settings) -> list[range]:
    """The numbers of the samples in each shard."""
    samples, size = settings["samples"], settings["shard_size"]
    return [range(start, min(start + size, samples)) for start in range(0, samples, size)]


def _unreadable(path: Path) -> int | None:
    """How many images a complete tar lacks; None for a tar whose index, which follows it, is not there or damaged."""
    try:
        index = INDEX.validate_json(index_path(path).read_bytes())
        return len(index["unreadable"]) if path.stat().st_size == index["bytes"] else None
    except (OSError, ValueError):
        return None
