"""A set of shards, what happens to damaged ones, and `featinv-pl verify`, which names every kind of damage."""

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import webdataset

from conftest import MakeBatch
from featinv_pl.__main__ import main
from featinv_pl.data.shards import reader
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.manifest import MANIFEST, index_path, read_manifest, write_manifest
from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.data.shards.samples import collate_samples
from featinv_pl.errors import UserError
from interrupts import Capture
from shard_sets import OPTION, flip, replace_member, write_set


def verify(capsys: Capture, *folders: Path) -> tuple[int, str]:
    """The status of the command, and what it prints."""
    status = 0
    try:
        main(["verify", *map(str, folders)])
    except SystemExit as stop:
        status = int(str(stop.code))
    return status, capsys.readouterr().out


# A set


def test_sets_are_read_by_us_and_by_webdataset(make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = make_batch(8)
    manifest = write_set(tmp_path, batch, shard_size=3)
    shards = ShardSet(tmp_path, "val", OPTION)
    assert [shard["samples"] for shard in manifest["shards"]] == shards.shard_sizes == [3, 3, 2]
    together = collate_samples([shards[index] for index in range(len(shards))])
    assert together["key"] == batch["key"]
    assert together["source"] == ["val"] * 8  # by the name that the user gave
    urls = [str(tmp_path / shard["name"]) for shard in manifest["shards"]]
    entries = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [entry["json"]["key"] for entry in entries] == batch["key"]
    assert [entry["__key__"] for entry in entries] == [f"{number:09d}" for number in range(8)]
    assert torch.equal(together["images"], batch["images"])
    assert torch.equal(together["labels"], batch["labels"])
    pixels = torch.stack([torch.tensor(entry["png"]) for entry in entries]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(pixels, batch["images"])
    for name, member in {"features": "features.npy", "logits": "logits.npy", "moments": "latent.npy"}.items():
        wide, half = cast(dict[str, Any], together)[name], cast(dict[str, Any], batch)[name].half()
        assert torch.equal(wide, half.float())
        assert np.array_equal([entry[member] for entry in entries], half.numpy())


def test_a_shard_stays_open_while_it_is_read(
    make_batch: MakeBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another thread opens so many others at that moment that this one is no longer among the last."""
    batch = make_batch(2)
    write_set(tmp_path, batch)
    shards, read = ShardSet(tmp_path, "val", OPTION), os.preadv

    def meanwhile(*arguments: Any) -> int:
        reader._open.cache_clear()
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", meanwhile)
    assert shards[0]["key"] == batch["key"][0]


def test_shards_stay_open_and_few_of_them(
    make_batch: MakeBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    class Counted(reader.OpenShard):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(reader, "OpenShard", Counted)
    write_set(tmp_path, make_batch(40), shard_size=1)
    shards = ShardSet(tmp_path, "val", OPTION)
    keys = [shards[number]["key"] for _ in range(3) for number in range(10)]
    assert len(opened) == len({*opened}) == 10
    assert keys[:10] == keys[10:20]
    for number in range(40):
        shards[number]
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert sum(link.startswith(str(tmp_path)) for link in links) <= reader.RECENT < 40
    with ThreadPoolExecutor(4) as pool:  # who share the files
        numbers = [*range(20, 40)] * 2
        assert [sample["key"] for sample in pool.map(shards.__getitem__, numbers)] == [
            shards[number]["key"] for number in numbers
        ]


# Sets that will not do


def rewritten(change: Callable[[str], str]) -> Callable[[Path], Any]:
    """Change the text of a manifest."""
    return lambda folder: (folder / MANIFEST).write_text(change((folder / MANIFEST).read_text()))


def resealed(name: str) -> Callable[[Path], Any]:
    """Give the first shard another name, in a manifest that is as it was written."""

    def rename(folder: Path) -> None:
        manifest = read_manifest(folder, OPTION)
        manifest["shards"][0]["name"] = name
        write_manifest(folder, manifest)

    return rename


def second(folder: Path) -> Path:
    return next(folder.glob("*-00001.tar"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "there is no folder '.*set'"),
        (lambda folder: (folder / MANIFEST).unlink(), f"has no {MANIFEST}, so it is not a finished shard set"),
        (rewritten(lambda text: text[:-20]), "is damaged"),
        (rewritten(lambda text: '{"format_version": 2, "shards": [{"name": "a.tar"}]}'), "is damaged"),
        (rewritten(lambda text: text.replace("10", "12")), "is damaged .it has changed since it was written"),
        (rewritten(lambda text: '{"format_version": 99}'), "shard format 99, and this version reads 2"),
        (lambda folder: second(folder).unlink(), r"-00001\.tar' is missing"),
        (lambda folder: second(folder).write_bytes(b""), r"-00001\.tar' has 0 of \d+ bytes"),
        (lambda folder: index_path(second(folder)).unlink(), r"-00001\.json' is missing"),
        (resealed("clean-00001.tar"), "it names a shard twice"),
        *(
            (resealed(name), r"is damaged .*shards\.0\.name String should match")
            for name in ("../other.tar", "/etc/passwd", "")
        ),
    ],
)
def test_refuses_a_set(damage: Callable[[Path], Any], message: str, make_batch: MakeBatch, tmp_path: Path) -> None:
    write_set(tmp_path / "set", make_batch(4), shard_size=2)
    damage(tmp_path / "set")
    with pytest.raises(UserError, match=f"{OPTION}: .*{message}"):
        ShardSet(tmp_path / "set", "val", OPTION)


# Samples that will not do


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


MAP = np.zeros((8, 4, 4), np.float16)


@pytest.mark.parametrize(
    ("suffix", "data", "message"),
    [
        ("features.npy", None, r"no member 'features\.npy'"),
        ("png", None, "no member 'jpg'"),
        ("features.npy", npy(MAP[:, :3]), r"features of shape \[8, 3, 4\] instead of \[8, 4, 4\]"),
        ("logits.npy", npy(np.zeros(9, np.float16)), r"logits of shape \[9\]"),
        ("features.npy", npy(MAP + np.float16("nan")), "not finite"),
        ("features.npy", npy(MAP.astype(np.float32)), "float32 instead of float16"),
        ("features.npy", npy(MAP)[:-2], "cannot reshape|EOF"),
        ("features.npy", npy(np.array([{}], dtype=object)), "pickle"),
        ("json", b"{}", "label"),
        ("png", b"no picture", "cannot identify image"),
    ],
)
def test_names_a_damaged_sample(
    suffix: str, data: bytes | None, message: str, make_batch: MakeBatch, tmp_path: Path
) -> None:
    write_set(tmp_path, make_batch(3))
    replace_member(tmp_path, 1, suffix, data)
    shards = ShardSet(tmp_path, "val", OPTION)
    assert shards[0]["key"] == "0-0"
    assert shards[2]["key"] == "0-2"
    with pytest.raises(UserError, match=rf"sample '000000001' of the shard '.*clean-00000\.tar'.*{message}"):
        shards[1]


def test_any_flipped_byte_is_noticed(make_batch: MakeBatch, tmp_path: Path) -> None:
    """Headers, data and padding: tar itself would notice those of headers alone, and webdataset not even those."""
    write_set(tmp_path, make_batch(2))
    path, shards = tmp_path / "clean-00000.tar", ShardSet(tmp_path, "val", OPTION)
    complete = path.read_bytes()
    for offset in range(0, len(complete) - 1024, 397):  # but for the tar's end, in which nothing lies
        flip(path, offset)
        with pytest.raises(UserError, match=r"'00000000\d' of the shard '.*clean-00000\.tar' .* has changed since"):
            [shards[0], shards[1]]
        flip(path, offset)
    path.write_bytes(complete[:-2048])
    assert shards[0]["key"] == "0-0"
    with pytest.raises(UserError, match=r"sample '000000001' .*: the shard ends before it"):
        shards[1]


# Folders of sets


@pytest.mark.parametrize("traces", [["extraction.json"], ["extraction.json", "a-00000.tar"], ["a-00000.tar"]])
def test_an_unfinished_set_is_refused(
    traces: list[str], make_batch: MakeBatch, tmp_path: Path, capsys: Capture
) -> None:
    """It used to be left out of the scores of its folder."""
    write_set(tmp_path / "shards/c/fog/3", make_batch(1))
    unfinished = tmp_path / "shards/c/fog/1"
    unfinished.mkdir()
    for name in traces:
        (unfinished / name).touch()
    message = f"`data.test.c`: '{unfinished}' has no manifest.json, so it is not a finished shard set. Finish it with"
    with pytest.raises(UserError, match=f"{message} the command that began it .featinv-pl predict., or"):
        FeatureShards(test={"c": tmp_path / "shards/c"}).test_dataloader()
    (tmp_path / "shards/predict.yaml").touch()
    with pytest.raises(UserError, match=f"{message}.*.featinv-pl predict --config {tmp_path}/shards/predict.yaml., or"):
        FeatureShards(test={"c": tmp_path / "shards/c"}).test_dataloader()
    assert verify(capsys, tmp_path / "shards/c")[0] == 1


# `featinv-pl verify`


def test_complete_sets(make_batch: MakeBatch, tmp_path: Path, capsys: Capture) -> None:
    for name in ("a", "b/1"):
        write_set(tmp_path / name, make_batch(5), shard_size=2)
    expected = "".join(f"{tmp_path / name}: complete: 3 shards, 5 samples\n" for name in ("a", "b/1"))
    expected += f"Results: nothing is damaged in {tmp_path}\n"
    expected += "Next: featinv-pl fit --config FILE --data.train=SET --data.val=SET\n"
    assert verify(capsys, tmp_path) == (0, expected)
    (tmp_path / "b/1" / MANIFEST).write_text("{")
    status, printed = verify(capsys, tmp_path / "b", tmp_path / "a")
    assert (status, printed.count(": damaged"), printed.count(": complete")) == (1, 1, 1)


def test_each_damage_is_named(make_batch: MakeBatch, tmp_path: Path, capsys: Capture) -> None:
    write_set(tmp_path, make_batch(15), shard_size=3)
    flip(tmp_path / "clean-00000.tar", -1)  # behind the last sample
    (tmp_path / "clean-00001.tar").unlink()
    flip(tmp_path / "clean-00002.json", 200)
    flip(tmp_path / "clean-00003.tar", 800)
    (tmp_path / "other.tar").touch()
    status, printed = verify(capsys, tmp_path)
    assert status == 1
    for fragment in (
        "damaged: 5 shards, 15 samples",
        "clean-00000.tar' has changed since it was written",
        "clean-00001.tar' is missing",
        "clean-00002.json' is damaged",
        "clean-00003.tar' has changed since it was written",
        "'000000009' of the shard",
        "other.tar' is not in the manifest",
    ):
        assert printed.count(fragment) == 1
    assert "00004" not in printed
