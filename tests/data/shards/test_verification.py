"""`featinv-pl verify`: every kind of damage is named."""

from pathlib import Path

import pytest

from conftest import MakeBatch
from featinv_pl.__main__ import main
from featinv_pl.data.shards.manifest import MANIFEST
from shard_sets import flip, write_set


def verify(*folders: Path) -> int:
    try:
        main(["verify", *map(str, folders)])
    except SystemExit as stop:
        return int(str(stop.code))
    return 0


def test_whole_sets(make_batch: MakeBatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b/1"):
        write_set(tmp_path / name, make_batch(5), shard_size=2)
    assert verify(tmp_path) == 0
    assert capsys.readouterr().out == "".join(
        f"{tmp_path / name}: complete: 3 shards, 5 samples\n" for name in ("a", "b/1")
    )


def test_each_damage_is_named(make_batch: MakeBatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path, make_batch(15), shard_size=3)
    flip(tmp_path / "clean-00000.tar", -1)  # behind the last sample
    (tmp_path / "clean-00001.tar").unlink()
    flip(tmp_path / "clean-00002.json", 200)
    flip(tmp_path / "clean-00003.tar", 800)
    (tmp_path / "other.tar").touch()
    assert verify(tmp_path) == 1
    printed = capsys.readouterr().out
    for fragment in (
        "damaged: 5 shards, 15 samples",
        "clean-00000.tar' has changed since it was written",
        "clean-00001.tar' is missing",
        "clean-00002.json' is damaged",
        "clean-00003.tar' has changed since it was written",
        "'000000009' of the shard",
        "other.tar' is not in the manifest",
    ):
        assert fragment in printed
    assert "00004" not in printed


def test_all_folders_are_checked(make_batch: MakeBatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path / "good", make_batch(3))
    write_set(tmp_path / "bad", make_batch(3))
    (tmp_path / "bad" / MANIFEST).write_text("{")
    assert verify(tmp_path / "bad", tmp_path / "good", tmp_path / "nowhere") == 1
    printed = capsys.readouterr().out
    assert printed.count(": damaged") == 2
    assert f"{tmp_path / 'good'}: complete" in printed
