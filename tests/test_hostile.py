"""Hostile and damaged files, some of those of `make torture`: each is refused with one sentence, and nothing runs."""

import contextlib
import io
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from featinv_pl.__main__ import main
from tiny import TRAINER
from torture.hostile import Kind, kinds, make_originals, trial, trials
from torture.spoils import ANY, BAD_PICTURES, RUNS

NAMES = [kind.name for kind in kinds(Path())]
EVERY = {"configuration": 2, "picture": 3, "authors' checkpoint": 8}  # of the ways to spoil one; else 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("hostile")
    with contextlib.redirect_stdout(io.StringIO()):
        make_originals(root)
    return root


def kind(name: str, root: Path) -> Kind:
    return next(kind for kind in kinds(root / "parts") if kind.name == name)


@pytest.mark.parametrize("name", NAMES)
def test_spoilt_files_end_in_one_sentence(name: str, root: Path) -> None:
    assert trial(root, kind(name, root), "*", lambda path: None, "never", authored=True) == "it passed for valid"
    ended = list(trials(root, kind(name, root), number=1, every=EVERY.get(name, 5)))
    assert [f"{what}: {wrong}" for what, wrong in ended if wrong] == []
    assert len(ended) >= 5


def test_pictures_that_cannot_be_read_are_counted_among_those_that_can(
    classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    frozen = {"backbone": str(classifier_folder), "autoencoder": str(prior_folder / "vae"), "image_size": 32}
    settings = {
        "trainer": {**TRAINER, "enable_progress_bar": False, "default_root_dir": "run"},
        "model": {"class_path": "FeatureExtraction", "init_args": frozen},
        "data": {"class_path": "FolderData", "init_args": {"predict": {"pictures": "pictures"}, "image_size": 32}},
    }
    Path("predict.yaml").write_text(yaml.safe_dump(settings))
    callback = f"--trainer.callbacks={json.dumps([{'class_path': 'ShardWriter', 'init_args': {'folder': 'shards'}}])}"
    with pytest.raises(SystemExit, match="1"):
        main(["predict", "--config", "predict.yaml", callback])
    assert "images cannot be read, the last of them" in capsys.readouterr().err
    main(["predict", "--config", "predict.yaml", callback, "--trainer.callbacks.max_bad_fraction=1"])
    manifest = json.loads(Path("shards/pictures/manifest.json").read_text())
    reasons = {one["key"]: one["reason"] for one in manifest["unreadable"]}
    assert manifest["samples"] == 2
    assert len(reasons) == len(BAD_PICTURES) + len(others)
    assert all(reasons.values())
    assert not Path("../ran").exists()


# What judges


def refuse(message: str, status: int = 1) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)


@pytest.mark.parametrize(
    ("do", "wrong"),
    [
        (lambda: None, "passed for valid"),
        (lambda: refuse("featinv-pl: error: 'in/picture.png' is damaged."), None),
        (lambda: refuse("featinv-pl: error: something is wrong."), "said"),
        (lambda: refuse("Traceback"), "ended with 1"),
        (lambda: [][0], "ended with IndexError"),
        (lambda: os.system("touch ../ran"), "ran code"),
        (lambda: Path("../outside").write_text("changed"), "wrote"),
        (lambda: Path("in/picture.png").unlink(), "wrote"),
        (lambda: bytearray(3 << 30), "ended with MemoryError"),
    ],
)
def test_a_trial_shows_what_must_not_happen(
    do: Callable[[], Any], wrong: str | None, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torture.hostile.main", lambda command: do())
    found = trial(root, kind("picture", root), "*", lambda path: None, "in/picture", authored=True)
    assert wrong in found if wrong and found else found is wrong


def test_a_pickle_does_run_without_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all the others rely on."""
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    pickle.loads(pickle.dumps(RUNS))
    assert Path("../ran").exists()
