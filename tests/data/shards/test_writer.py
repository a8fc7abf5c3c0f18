"""A set that is interrupted, shared out, or lacks some of its images."""

from pathlib import Path
from typing import Any

import pytest

from conftest import MakeBatch
from featinv_pl.data.shards.manifest import read_manifest
from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.data.shards.writer import ShardSetWriter
from featinv_pl.errors import UserError
from featinv_pl.types import Batch
from shard_sets import OPTION, provenance_of, settings_of

SIZE = 11


def part(batch: Batch, numbers: range) -> Batch:
    """Some samples of a batch."""
    return {  # type: ignore[return-value]
        name: [value[n] for n in numbers] if isinstance(value, list) else value[list(numbers)]  # type: ignore[index]
        for name, value in batch.items()
    }


def writer_of(folder: Path, batch: Batch, rank: int = 0, world_size: int = 1, bad: float = 0.0) -> ShardSetWriter:
    return ShardSetWriter(folder, "clean", settings_of(batch, 3), provenance_of(batch), rank, world_size, bad)


def write(folder: Path, batch: Batch, shards: int | None = None, world_size: int = 1, bad: float = 0.0) -> None:
    """Write all that is missing, or so many shards of it on each rank."""
    writers = [writer_of(folder, batch, rank, world_size, bad) for rank in range(world_size)]
    writers[0].begin()
    for writer in writers:
        for samples in writer.share[:shards]:
            writer.add(part(batch, samples))
        writer.flush()
        writer.close()
    if shards is None:
        writers[0].finish()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("done", [2, 4])  # 4 are all, of which only the manifest is missing
def test_resumes_after_the_last_complete_shard(done: int, make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = make_batch(SIZE)
    write(tmp_path / "whole", batch)
    folder = tmp_path / "parts"
    write(folder, batch, shards=done)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("clean-*")}
    assert len(kept) == 2 * done
    (folder / "clean-00002.tar.partial").write_bytes(b"half")
    with pytest.raises(UserError, match="not a finished shard set"):
        read_manifest(folder, OPTION)
    write(folder, batch)
    assert files(folder) == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    writer = writer_of(folder, batch)  # to a finished set nothing is added
    assert (writer.finished, writer.share) == (True, [])
    writer.begin()
    assert files(folder) == files(tmp_path / "whole")


def test_writes_incomplete_shards_again(make_batch: MakeBatch, tmp_path: Path) -> None:
    batch, parts = make_batch(SIZE), tmp_path / "parts"
    write(tmp_path / "whole", batch)
    write(parts, batch, shards=3)
    (parts / "clean-00000.tar").unlink()
    (parts / "clean-00001.json").unlink()
    tar = parts / "clean-00002.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    write(parts, batch)
    assert files(parts) == files(tmp_path / "whole")


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_without_duplicates_or_padding(world_size: int, make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = make_batch(SIZE)
    write(tmp_path / "one", batch)
    write(tmp_path / "many", batch, shards=1, world_size=2)
    shares = [writer_of(tmp_path / "none", batch, rank, world_size).share for rank in range(world_size)]
    assert sorted(n for share in shares for samples in share for n in samples) == list(range(SIZE))
    write(tmp_path / "many", batch, world_size=world_size)  # another number than that which began
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_refuses_to_go_on_with_other_settings(make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = make_batch(SIZE)
    write(tmp_path, batch, shards=1)
    before = files(tmp_path)
    for name, value in {"storage": "int8", "images_sha256": "1", "backbone_digest": "c"}.items():
        parts: list[Any] = [settings_of(batch, 3), provenance_of(batch)]
        next(part for part in parts if name in part)[name] = value
        with pytest.raises(
            UserError, match=f"part of a shard set, made with other settings .*{name}: .*, {value} here"
        ):
            ShardSetWriter(tmp_path, "clean", *parts)
    (tmp_path / "extraction.json").write_text("{")
    with pytest.raises(UserError, match=r"extraction\.json' is damaged .* Choose another folder, or remove it"):
        writer_of(tmp_path, batch)
    (tmp_path / "extraction.json").unlink()
    with pytest.raises(UserError, match="holds tars, and no "):
        writer_of(tmp_path, batch)
    assert {**files(tmp_path), "extraction.json": before["extraction.json"]} == before


def test_unreadable_images_are_named_and_counted(make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = make_batch(SIZE)
    batch["unreadable"] = ["cut short" if n in (4, 5) else "" for n in range(SIZE)]
    write(tmp_path / "set", batch, bad=0.2)
    manifest = read_manifest(tmp_path / "set", OPTION)
    assert manifest["unreadable"] == [{"key": f"0-{n}", "reason": "cut short"} for n in (4, 5)]
    assert [shard["samples"] for shard in manifest["shards"]] == [3, 1, 3, 2]
    shards = ShardSet(tmp_path / "set", "val", OPTION)
    assert [shards[n]["key"] for n in range(manifest["samples"])] == [f"0-{n}" for n in range(SIZE) if n not in (4, 5)]
    with pytest.raises(UserError, match=r"2 of 11 images cannot be read, the last of them '0-5' \(cut short\)"):
        write(tmp_path / "strict", batch, bad=0.1)
    assert not (tmp_path / "strict/manifest.json").exists()
    write(tmp_path / "strict", batch, bad=0.2)
    assert files(tmp_path / "strict") == files(tmp_path / "set")
