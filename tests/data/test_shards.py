"""One entry there and back, a set of shards, and what happens to damaged ones."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from shard_sets import OPTION, write_set
from torch import Tensor

from conftest import MakeBatch
from featinv_pl.data.shards import (
    MANIFEST,
    ShardSet,
    ShardSetWriter,
    collate_samples,
    decode,
    encode,
    find_sets,
    read_manifest,
)
from featinv_pl.errors import UserError


def half(tensor: Tensor) -> Tensor:
    """What fp16 keeps."""
    return tensor.half().float()


# One entry


def test_png_entry_comes_back_whole(make_batch: MakeBatch) -> None:
    batch = make_batch(3, source="corrupted/fog/3")
    sample = decode(encode(batch, 1, "png"), with_images=True)
    assert torch.equal(sample["images"], batch["images"][1])
    for name in ("features", "logits", "latents"):
        assert torch.equal(sample[name], half(batch[name][1]))
        assert sample[name].dtype == torch.float32
    assert sample["labels"] == batch["labels"][1]
    assert sample["source"] == "corrupted/fog/3"
    assert sample["key"] == "0-1"


def test_jpg_entry_keeps_what_is_seen(make_batch: MakeBatch) -> None:
    batch = make_batch(1)
    batch["images"] = torch.stack([torch.linspace(-1, 1, 32).expand(32, 32)] * 3).unsqueeze(0).clone()
    members = encode(batch, 0, "jpg")
    assert Image.open(io.BytesIO(members["jpg"])).format == "JPEG"
    sample = decode(members, with_images=True)
    torch.testing.assert_close(sample["images"], batch["images"][0], rtol=0, atol=0.05)
    assert torch.equal(sample["features"], half(batch["features"][0]))


def test_images_are_optional(make_batch: MakeBatch) -> None:
    batch = make_batch(2)
    assert "images" not in decode(encode(batch, 0, "png"), with_images=False)
    samples = [decode(encode(batch, index, "png"), with_images=False) for index in range(2)]
    assert collate_samples(samples).keys() == {"features", "logits", "latents", "labels", "source", "key"}


@pytest.mark.parametrize("name", ["features", "logits", "latents"])
@pytest.mark.parametrize("value", [70000.0, float("nan")])
def test_refuses_what_half_precision_cannot_hold(name: str, value: float, make_batch: MakeBatch) -> None:
    batch: Any = make_batch(2)
    batch[name][1].flatten()[3] = value
    encode(batch, 0, "png")
    with pytest.raises(UserError, match=rf"The {name} do not fit half precision: .* is {value:g}"):
        encode(batch, 1, "png")


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
    for name in ("features", "logits", "latents"):
        assert torch.equal(together[name], half(batch[name]))
    with pytest.raises(IndexError):
        shards[8]


def test_manifest_describes_the_files(make_batch: MakeBatch, tmp_path: Path) -> None:
    manifest = write_set(tmp_path, make_batch(5, source="corrupted/fog/3"), shard_size=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "corrupted-fog-3-0000-00000.tar",
        "corrupted-fog-3-0000-00001.tar",
        MANIFEST,
    ]
    for shard in manifest["shards"]:
        data = (tmp_path / shard["name"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    assert read_manifest(tmp_path, OPTION) == manifest


def test_nothing_has_its_name_before_it_is_whole(make_batch: MakeBatch, tmp_path: Path) -> None:
    batch, writer = make_batch(4), ShardSetWriter(tmp_path, "clean", shard_size=3)
    for index in range(4):
        writer.add(batch, index)
        assert [path.suffix for path in sorted(tmp_path.iterdir())] == (
            [".partial"] if index < 2 else [".tar"] if index == 2 else [".tar", ".partial"]
        )
    writer.close()
    assert {path.name for path in tmp_path.iterdir()} == {"clean-0000-00000.tar", "clean-0000-00001.tar.partial"}
    assert len(writer.shards) == 1
    with pytest.raises(UserError, match="no finished shard set"):
        read_manifest(tmp_path, OPTION)

    write_set(tmp_path, batch, shard_size=3)  # another attempt takes over what was left
    assert len(ShardSet(tmp_path, "clean", OPTION)) == 4
    assert not list(tmp_path.glob("*.partial"))


def test_equal_content_gives_equal_bytes(make_batch: MakeBatch, tmp_path: Path) -> None:
    one, other = (write_set(tmp_path / name, make_batch(3)) for name in ("one", "other"))
    assert one == other
    changed = make_batch(3)
    changed["logits"][2, 0] += 0.5
    assert write_set(tmp_path / "changed", changed)["shards"][0]["sha256"] != one["shards"][0]["sha256"]
    with tarfile.open(tmp_path / "one" / one["shards"][0]["name"]) as tar:
        assert {(member.mtime, member.uname, member.gname) for member in tar} == {(0, "featinv", "featinv")}


def test_ranks_write_beside_each_other(make_batch: MakeBatch, tmp_path: Path) -> None:
    batch, writers = make_batch(4), [ShardSetWriter(tmp_path, "clean", rank, shard_size=1) for rank in range(2)]
    for index in range(4):
        writers[index % 2].add(batch, index)
    names = [shard["name"] for writer in writers for shard in writer.shards]
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert len(set(names)) == 4
    samples = webdataset.WebDataset([str(tmp_path / name) for name in names], shardshuffle=False)
    assert len({sample["__key__"] for sample in samples}) == 4


def test_webdataset_reads_them(make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = make_batch(5)
    names = [shard["name"] for shard in write_set(tmp_path, batch, shard_size=3)["shards"]]
    urls = [str(tmp_path / name) for name in names]
    entries = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [entry["json"]["key"] for entry in entries] == batch["key"]
    assert [entry["__key__"] for entry in entries] == [f"0000-{number:09d}" for number in range(5)]
    for index, entry in enumerate(entries):
        assert np.array_equal(entry["features.npy"], batch["features"][index].half().numpy())
        assert np.array_equal(entry["latent.npy"], batch["latents"][index].half().numpy())
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
    (folder / MANIFEST).write_text('{"format_version": 1, "shards": [{"name": "a.tar"}]}')


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
        (without_manifest, f"has no {MANIFEST}, so it is no finished shard set"),
        (damaged_manifest, f"{MANIFEST}' is damaged"),
        (manifest_of_nothing, f"{MANIFEST}' is damaged"),
        (manifest_without_sizes, f"{MANIFEST}' is damaged"),
        (another_version, "shard format 99, and this version reads 1"),
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


def replace_member(folder: Path, number: int, suffix: str, data: bytes | None) -> None:
    """Replace (or take out) one member of a sample in a set of one shard, and let the manifest agree."""
    manifest = json.loads((folder / MANIFEST).read_text())
    path = folder / manifest["shards"][0]["name"]
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member)) for member in tar]
        contents = {name: file.read() for name, file in members if file is not None}
    name = f"0000-{number:09d}.{suffix}"
    assert name in contents
    if data is None:
        del contents[name]
    else:
        contents[name] = data
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    manifest["shards"][0]["bytes"] = path.stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))


MAP = np.zeros((8, 4, 4), np.float16)


@pytest.mark.parametrize(
    ("suffix", "data", "message"),
    [
        ("features.npy", None, r"no member 'features\.npy'"),
        ("logits.npy", None, r"no member 'logits\.npy'"),
        ("latent.npy", None, r"no member 'latent\.npy'"),
        ("json", None, "no member 'json'"),
        ("png", None, "no member 'jpg'"),
        ("features.npy", npy(MAP[:, :3]), r"a map of shape \(8, 3, 4\) instead of \(8, 4, 4\)"),
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
    with pytest.raises(UserError, match=rf"sample '0000-000000001' of the shard '.*clean-0000-00000\.tar'.*{message}"):
        shards[1]


def test_names_a_sample_whose_logits_have_another_shape(make_batch: MakeBatch, tmp_path: Path) -> None:
    write_set(tmp_path, make_batch(3))
    replace_member(tmp_path, 1, "logits.npy", npy(np.zeros(9, np.float16)))
    with pytest.raises(UserError, match=r"sample '0000-000000001' of the shard '.*clean-0000-00000\.tar'"):
        ShardSet(tmp_path, "val", OPTION)[1]


@pytest.mark.parametrize("header", [0, 7])
def test_no_damaged_header_loses_samples_without_a_word(header: int, make_batch: MakeBatch, tmp_path: Path) -> None:
    manifest = write_set(tmp_path, make_batch(3))
    path = tmp_path / manifest["shards"][0]["name"]
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[header].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"The shard '.*clean-0000-00000\.tar' is damaged"):
        ShardSet(tmp_path, "val", OPTION)[0]


# Folders of sets


def test_finds_a_set_or_the_sets_below(make_batch: MakeBatch, tmp_path: Path) -> None:
    for name in ("fog/3", "fog/1", "snow/1"):
        write_set(tmp_path / "c" / name, make_batch(1))
    (tmp_path / "c" / "empty").mkdir()
    assert list(find_sets("imagenet-c", tmp_path / "c", OPTION).items()) == [
        (f"imagenet-c/{name}", tmp_path / "c" / name) for name in ("fog/1", "fog/3", "snow/1")
    ]
    assert find_sets("one", tmp_path / "c/fog/3", OPTION) == {"one": tmp_path / "c/fog/3"}


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_sets_is_refused_under_its_own_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ((source, folder),) = find_sets("mine", tmp_path / name, OPTION).items()
    assert source == "mine"
    with pytest.raises(UserError, match=f"{OPTION}: .*'{tmp_path / name}'"):
        ShardSet(folder, source, OPTION)
