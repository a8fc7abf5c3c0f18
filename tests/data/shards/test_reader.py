"""A set of shards, and what happens to damaged ones."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from torch import Tensor

from conftest import MakeBatch
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.manifest import MANIFEST, find_sets, index_path, read_manifest, write_manifest
from featinv_pl.data.shards.reader import ShardSet
from featinv_pl.data.shards.samples import collate_samples
from featinv_pl.data.shards.verification import verify
from featinv_pl.errors import UserError
from shard_sets import OPTION, replace_member, write_set


def half(tensor: Tensor) -> Tensor:
    """What fp16 keeps."""
    return tensor.half().float()


# A set


def test_set_gives_every_sample_by_its_index(make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = make_batch(8)
    manifest = write_set(tmp_path, batch, shard_size=3)
    shards = ShardSet(tmp_path, "val", OPTION)
    assert [shard["samples"] for shard in manifest["shards"]] == shards.shard_sizes == [3, 3, 2]
    assert len(shards) == 8
    together = collate_samples([shards[index] for index in range(8)])
    assert together["key"] == batch["key"]
    assert together["source"] == ["val"] * 8  # by the name that the user gave
    assert torch.equal(together["images"], batch["images"])
    assert torch.equal(together["labels"], batch["labels"])
    for name in ("features", "logits", "moments"):
        assert torch.equal(together[name], half(batch[name]))
    with pytest.raises(IndexError):
        shards[8]


def test_manifest_describes_the_files(make_batch: MakeBatch, tmp_path: Path) -> None:
    manifest = write_set(tmp_path, make_batch(5, source="corrupted/fog/3"), shard_size=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "corrupted-fog-3-00000.json",
        "corrupted-fog-3-00000.tar",
        "corrupted-fog-3-00001.json",
        "corrupted-fog-3-00001.tar",
        MANIFEST,
    ]
    for shard in manifest["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert read_manifest(tmp_path, OPTION) == manifest


def test_equal_content_gives_equal_bytes(make_batch: MakeBatch, tmp_path: Path) -> None:
    one, other = (write_set(tmp_path / name, make_batch(3)) for name in ("one", "other"))
    assert one == other
    changed = make_batch(3)
    changed["logits"][2, 0] += 0.5
    assert write_set(tmp_path / "changed", changed)["shards"][0]["sha256"] != one["shards"][0]["sha256"]
    with tarfile.open(tmp_path / "one" / one["shards"][0]["name"]) as tar:
        assert {(member.mtime, member.uname, member.gname) for member in tar} == {(0, "featinv", "featinv")}


def test_webdataset_reads_them(make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = make_batch(5)
    names = [shard["name"] for shard in write_set(tmp_path, batch, shard_size=3)["shards"]]
    urls = [str(tmp_path / name) for name in names]
    entries = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [entry["json"]["key"] for entry in entries] == batch["key"]
    assert [entry["__key__"] for entry in entries] == [f"{number:09d}" for number in range(5)]
    for index, entry in enumerate(entries):
        assert np.array_equal(entry["features.npy"], batch["features"][index].half().numpy())
        assert np.array_equal(entry["latent.npy"], batch["moments"][index].half().numpy())
        pixels = torch.tensor(entry["png"]).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(pixels, batch["images"][index])


# Sets that will not do


def without_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def without_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damaged_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])


def manifest_of_nothing(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def manifest_without_sizes(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format_version": 2, "shards": [{"name": "a.tar"}]}')


def changed_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"num_classes": 10', '"num_classes": 12'))


def respaced_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + " ")


def another_version(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format_version": 99, "shards": []}')


def without_shard(folder: Path) -> None:
    next(folder.glob("*-00001.tar")).unlink()


def short_shard(folder: Path) -> None:
    shard = next(folder.glob("*-00001.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_folder, "there is no folder '.*set'"),
        (without_manifest, f"has no {MANIFEST}, so it is not a finished shard set"),
        (damaged_manifest, f"{MANIFEST}' is damaged"),
        (manifest_of_nothing, f"{MANIFEST}' is damaged"),
        (manifest_without_sizes, f"{MANIFEST}' is damaged"),
        (changed_manifest, f"{MANIFEST}' is damaged .it has changed since it was written"),
        (respaced_manifest, f"{MANIFEST}' is damaged .it has changed since it was written"),
        (another_version, "shard format 99, and this version reads 2"),
        (without_shard, r"shard '.*-00001\.tar' is missing; its manifest says \d+ bytes"),
        (short_shard, r"shard '.*-00001\.tar' has \d+ bytes; its manifest says \d+ bytes"),
    ],
)
def test_refuses_a_set(damage: Callable[[Path], None], message: str, make_batch: MakeBatch, tmp_path: Path) -> None:
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
        ("logits.npy", None, r"no member 'logits\.npy'"),
        ("latent.npy", None, r"no member 'latent\.npy'"),
        ("json", None, "no member 'json'"),
        ("png", None, "no member 'jpg'"),
        ("features.npy", npy(MAP[:, :3]), r"a feature map of shape \(8, 3, 4\) instead of \(8, 4, 4\)"),
        ("features.npy", npy(MAP + np.float16("nan")), "not finite"),
        ("latent.npy", npy(MAP + np.float16("inf")), "not finite"),
        ("features.npy", npy(MAP.astype(np.float32)), "float32 instead of float16"),
        ("features.npy", npy(MAP)[:-2], "cannot reshape|EOF"),
        ("features.npy", npy(np.array([{}], dtype=object)), "pickle"),
        ("features.npy", b"", "cannot be read"),
        ("features.npy", npy(MAP).replace(b"}", b" "), "cannot be read"),
        ("json", b"{", ""),
        ("json", b"{}", "label"),
        ("png", b"no picture", "cannot identify image"),
    ],
)
def test_names_a_damaged_sample_and_its_shard(
    suffix: str, data: bytes | None, message: str, make_batch: MakeBatch, tmp_path: Path
) -> None:
    write_set(tmp_path, make_batch(3))
    replace_member(tmp_path, 1, suffix, data)
    shards = ShardSet(tmp_path, "val", OPTION)
    assert shards[0]["key"] == "0-0"
    assert shards[2]["key"] == "0-2"
    with pytest.raises(UserError, match=rf"sample '000000001' of the shard '.*clean-00000\.tar'.*{message}"):
        shards[1]


def test_names_a_sample_whose_logits_have_another_shape(make_batch: MakeBatch, tmp_path: Path) -> None:
    write_set(tmp_path, make_batch(3))
    replace_member(tmp_path, 1, "logits.npy", npy(np.zeros(9, np.float16)))
    with pytest.raises(UserError, match=r"sample '000000001' of the shard '.*clean-00000\.tar'"):
        ShardSet(tmp_path, "val", OPTION)[1]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_any_flipped_byte_is_noticed(make_batch: MakeBatch, tmp_path: Path) -> None:
    """Headers, data and padding: tar itself would notice those of headers alone, and webdataset not even those."""
    manifest = write_set(tmp_path, make_batch(2))
    path = tmp_path / manifest["shards"][0]["name"]
    whole = path.read_bytes()
    end = len(whole) - 1024  # the tar's end, in which nothing lies
    for offset in range(0, end, 97):
        flip(path, offset)
        shards = ShardSet(tmp_path, "val", OPTION)
        with pytest.raises(UserError, match=r"'00000000\d' of the shard '.*clean-00000\.tar' .* has changed since"):
            [shards[0], shards[1]]
        path.write_bytes(whole)


def test_a_changed_index_is_noticed(make_batch: MakeBatch, tmp_path: Path) -> None:
    manifest = write_set(tmp_path, make_batch(2))
    flip(index_path(tmp_path / manifest["shards"][0]["name"]), 300)
    with pytest.raises(UserError, match=r"index '.*clean-00000\.json' is damaged"):
        ShardSet(tmp_path, "val", OPTION)[0]


def test_a_tar_cut_short_while_it_is_read_is_noticed(make_batch: MakeBatch, tmp_path: Path) -> None:
    manifest = write_set(tmp_path, make_batch(2))
    shards = ShardSet(tmp_path, "val", OPTION)
    path = tmp_path / manifest["shards"][0]["name"]
    path.write_bytes(path.read_bytes()[:-2048])
    assert shards[0]["key"] == "0-0"
    with pytest.raises(UserError, match=r"sample '000000001' .*: the shard ends before it"):
        shards[1]


def test_skips_and_says_what(make_batch: MakeBatch, tmp_path: Path) -> None:
    manifest = write_set(tmp_path, make_batch(9), shard_size=3)
    names = [shard["name"] for shard in manifest["shards"]]
    flip(tmp_path / names[0], 700)
    (tmp_path / names[1]).unlink()
    shards = ShardSet(tmp_path, "val", OPTION, on_error="skip")
    assert len(shards) == 6
    assert len(shards.skipped) == 3
    assert "clean-00001.tar' is missing" in shards.skipped[0]
    batch = shards.batch(range(6))
    assert batch["key"] == ["0-1", "0-2", "0-6", "0-7", "0-8"]
    assert [re.findall(r"sample '(\d+)'", line) for line in batch["skipped"]] == [["000000000"]]
    with pytest.raises(UserError, match="All 1 samples of a batch are damaged"):
        shards.batch([0])


def test_names_that_reach_outside_are_refused(make_batch: MakeBatch, tmp_path: Path) -> None:
    write_set(tmp_path / "set", make_batch(1))
    manifest = json.loads((tmp_path / "set" / MANIFEST).read_text())
    for name in ("../other.tar", "/etc/passwd", "a/b.tar", "..", ".hidden", ""):
        manifest["shards"][0]["name"] = name
        write_manifest(tmp_path / "set", manifest)
        with pytest.raises(UserError, match=r"is damaged .*shards\.0\.name String should match"):
            ShardSet(tmp_path / "set", "val", OPTION)


# Folders of sets


def test_finds_a_set_or_the_sets_below(make_batch: MakeBatch, tmp_path: Path) -> None:
    for name in ("fog/3", "fog/1", "snow/1"):
        write_set(tmp_path / "c" / name, make_batch(1))
    (tmp_path / "c" / "empty").mkdir()
    assert list(find_sets("imagenet-c", tmp_path / "c").items()) == [
        (f"imagenet-c/{name}", tmp_path / "c" / name) for name in ("fog/1", "fog/3", "snow/1")
    ]
    assert find_sets("one", tmp_path / "c/fog/3") == {"one": tmp_path / "c/fog/3"}


@pytest.mark.parametrize("traces", [["extraction.json"], ["extraction.json", "a-00000.tar"], ["a-00000.tar"]])
def test_an_unfinished_set_is_refused_with_the_command_that_finishes_it(
    traces: list[str], make_batch: MakeBatch, tmp_path: Path
) -> None:
    """It used to be left out of the scores of its folder."""
    write_set(tmp_path / "shards/c/fog/3", make_batch(1))
    unfinished = tmp_path / "shards/c/fog/1"
    unfinished.mkdir()
    for name in traces:
        (unfinished / name).touch()
    message = f"`data.test.c`: '{unfinished}' has no manifest.json, so it is not a finished shard set. Finish it with"
    with pytest.raises(UserError, match=f"{message} the command that began it .featinv-pl predict., or"):
        FeatureShards(test={"c": tmp_path / "shards/c"})
    (tmp_path / "shards/predict.yaml").touch()
    with pytest.raises(UserError, match=f"{message}.*.featinv-pl predict --config {tmp_path}/shards/predict.yaml., or"):
        FeatureShards(test={"c": tmp_path / "shards/c"})
    assert not verify(tmp_path / "shards/c")


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_sets_is_refused_under_its_own_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ((source, folder),) = find_sets("mine", tmp_path / name).items()
    assert source == "mine"
    with pytest.raises(UserError, match=f"{OPTION}: .*'{tmp_path / name}'"):
        ShardSet(folder, source, OPTION)


def test_many_shards_need_few_open_files(make_batch: MakeBatch, tmp_path: Path) -> None:
    write_set(tmp_path, make_batch(80), shard_size=1)
    shards = ShardSet(tmp_path, "val", OPTION)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [shards[number]["key"] for number in range(80)] == [f"0-{number}" for number in range(80)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
