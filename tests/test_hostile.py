"""Hostile and damaged files, some of those of `make torture`: each is refused with one sentence, and nothing runs."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from featinv_pl.__main__ import main
from test_cli import refused
from tiny import extraction, write
from torture.hostile import Kind, kinds, make_originals, trial, trials
from torture.spoils import ANY, BAD_PICTURES

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
