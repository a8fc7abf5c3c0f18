"""A short form of `make torture`: kills, a full disk, spoilt files; ranks that end are in runtime/test_stopping.py."""

import contextlib
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from featinv_pl.__main__ import main
from interrupts import Capture
from test_cli import refused
from tiny import extraction, write
from torture import kills
from torture.hostile import Kind, kinds, make_originals, trial, trials
from torture.kills import PREDICT, Stage, fill_disk, kill_stage, prepare
from torture.spoils import ANY, BAD_PICTURES

FIT = replace(kills.FIT, args=(*kills.FIT.args, "--data.num_workers=0"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("torture"))


@pytest.mark.parametrize("stage", [PREDICT, FIT], ids=["predict", "fit"])
def test_a_kill_loses_nothing(stage: Stage, root: Path) -> None:
    figure = kill_stage(root, stage, 1, random.Random(0))
    assert (figure.times, figure.wrong) == (1, 0), figure


def test_a_full_disk_loses_nothing(root: Path) -> None:
    assert fill_disk(root, PREDICT, 1, random.Random(0)).wrong == 0


NAMES = [kind.name for kind in kinds(Path())]
EVERY = {"configuration": 2, "picture": 3, "authors' checkpoint": 8}  # of the ways to spoil one; else 5


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("hostile")
    with contextlib.redirect_stdout(io.StringIO()):
        make_originals(root)
    return root


def kind(name: str, originals: Path) -> Kind:
    return next(kind for kind in kinds(originals / "parts") if kind.name == name)


@pytest.mark.parametrize("name", NAMES)
def test_spoilt_files_end_in_one_sentence(name: str, originals: Path) -> None:
    assert (
        trial(originals, kind(name, originals), "*", lambda path: None, "never", authored=True) == "it passed for valid"
    )
    ended = list(trials(originals, kind(name, originals), number=1, every=EVERY.get(name, 5)))
    assert [f"{what}: {wrong}" for what, wrong in ended if wrong] == []
    assert len(ended) >= 5


def test_unreadable_pictures_are_counted(classifier_folder: Path, prior_folder: Path, capsys: Capture) -> None:
    """All bad pictures in one folder, beside two good ones: they are left out, with the reason, if that is allowed."""
    Path("pictures").mkdir()
    for number in range(2):
        Image.effect_noise((40, 40), 90).convert("RGB").save(f"pictures/good-{number}.png")
    for number, data in enumerate(BAD_PICTURES.values()):
        Path(f"pictures/bad-{number}.png").write_bytes(data)
    others = [name for name in ANY if name not in ("folder", "missing")]
    for name in others:
        path = Path(f"pictures/{name}.png")
        path.write_bytes(b"picture")
        ANY[name](path)
    settings = extraction(classifier_folder, prior_folder, [])
    images = {"predict": {"pictures": "pictures"}, "image_size": 32}
    settings["data"] = {"class_path": "FolderData", "init_args": images}
    command = ["predict", "--config", write(Path("predict.yaml"), settings)]
    refused(command, capsys, "images cannot be read, the last of them")
    main([*command, "--trainer.callbacks.max_bad_fraction=1"])
    manifest = json.loads(Path("shards/pictures/manifest.json").read_text())
    reasons = {one["key"]: one["reason"] for one in manifest["unreadable"]}
    assert manifest["samples"] == 2
    assert len(reasons) == len(BAD_PICTURES) + len(others)
    assert all(reasons.values())
    assert not Path("../ran").exists()
