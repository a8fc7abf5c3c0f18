"""Hostile and broken files: nothing runs, nothing is written elsewhere, and one message says what is wrong.

`make torture` tries ten times as much.
"""

import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from featinv_pl.__main__ import main
from torture.damage import OUTCOMES, WRONG, Bench, Kind, Trial, damaged, figure, kinds, make_originals, revalued
from torture.hostile_files import ANY, PICTURES, Runs, content

NAMES = [kind.name for kind in kinds(Path())]
WITH_VALUES = [kind.name for kind in kinds(Path()) if kind.values]
EVERY = {  # of what takes longer, a part will do here
    "checkpoint": 3,
    "model folder": 3,
    "prior": 3,
    "authors' checkpoint": 6,
    "authors' weights": 3,
    "scores of a run": 2,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("hostile")
    make_originals(root)
    return Bench(root)


def of(name: str, bench: Bench) -> Kind:
    return next(kind for kind in kinds(bench.root) if kind.name == name)


class Judge:
    """Takes trials, and keeps those that ended wrong."""

    def __init__(self) -> None:
        self.trials = 0
        self.wrong: list[str] = []

    def __call__(self, what: str, trial: Trial) -> None:
        self.trials += 1
        if trial.outcome in WRONG:
            self.wrong.append(f"{what}: {trial.outcome}: {trial.said[-500:]}")


@pytest.mark.parametrize("name", NAMES)
def test_files_that_were_made_to_do_harm(name: str, bench: Bench) -> None:
    kind, judge = of(name, bench), Judge()
    for what, spoil in list(kind.spoils.items())[:: EVERY.get(name, 1)]:
        judge(what, bench.trial(kind, spoil, authored=True))
    assert judge.wrong == []
    assert judge.trials >= 6


@pytest.mark.parametrize("name", NAMES)
def test_files_that_were_damaged(name: str, bench: Bench) -> None:
    judge = Judge()
    damaged(bench, of(name, bench), 8, judge)
    assert judge.wrong == []
    assert judge.trials >= 5


@pytest.mark.parametrize("name", WITH_VALUES)
def test_values_that_nobody_expects(name: str, bench: Bench) -> None:
    judge = Judge()
    revalued(bench, of(name, bench), 10, judge)
    assert judge.wrong == []
    assert judge.trials >= 8


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_spoilt_is_read(name: str, bench: Bench) -> None:
    """Or, of the plan of a study, comes to the check that stands behind all others."""
    kind = of(name, bench)
    assert bench.trial(kind, lambda folder: None, authored=False).outcome == "harmless"
    ended, said = bench.unspoilt(kind)
    assert ended == 0 or (name == "plan of a study" and "there is no 'nowhere'" in said)


# Folders of pictures


def test_pictures_that_cannot_be_read_are_counted_among_those_that_can(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    """All bad pictures in one folder, beside two good ones: they are left out, with the reason, if that is allowed."""
    folder = Path("pictures")
    folder.mkdir()
    for number in range(2):
        Image.effect_noise((40, 40), 90).convert("RGB").save(folder / f"good-{number}.png")
    for number, data in enumerate(PICTURES.values()):
        content(data)(folder / f"bad-{number}.png")
    for spoil in ANY:
        if spoil.__name__ not in ("a_folder", "missing"):
            content(b"picture")(folder / f"{spoil.__name__}.png")
            spoil(folder / f"{spoil.__name__}.png")
    parts = bench.root / "parts"
    settings = {
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": "run"},
        "model": {
            "class_path": "FeatureExtraction",
            "init_args": {
                "backbone": str(parts / "classifier"),
                "autoencoder": str(parts / "prior/vae"),
                "image_size": 32,
            },
        },
        "data": {"class_path": "FolderData", "init_args": {"predict": {"pictures": "pictures"}, "image_size": 32}},
    }
    writer = {"class_path": "ShardWriter", "init_args": {"folder": "shards"}}
    Path("predict.yaml").write_text(yaml.safe_dump(settings))
    callback = f"--trainer.callbacks=[{json.dumps(writer)}]"
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--config", "predict.yaml", callback])
    assert stop.value.code == 1
    assert "images cannot be read, the last of them" in capsys.readouterr().err
    main(["predict", "--config", "predict.yaml", callback, "--trainer.callbacks.max_bad_fraction=1"])
    manifest = json.loads(Path("shards/pictures/manifest.json").read_text())
    reasons = {one["key"]: one["reason"] for one in manifest["unreadable"]}
    assert manifest["samples"] + len(reasons) == len(PICTURES) + len(ANY)
    assert all(reasons.values())
    assert {"bad-0.png", "a_pipe_that_never_ends.png", "a_link_to_endless_zeros.png"} <= reasons.keys()
    assert not {"good-0.png", "good-1.png"} & reasons.keys()
    assert not Path("../ran").exists()


# The judge


def test_trials_see_what_must_not_happen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = of("picture", bench)
    unspoilt = bench.unspoilt(kind)

    def outcome(do: Callable[[], Any]) -> str:
        def main(command: list[str]) -> None:
            do()

        with monkeypatch.context() as patched:
            patched.setattr("torture.damage.main", main)
            return bench.trial(kind, lambda folder: None, authored=False).outcome

    def refuse(message: str, status: int = 1) -> None:
        print(message, file=sys.stderr)
        sys.exit(status)

    monkeypatch.setattr("torture.damage.SECONDS", 1)
    assert outcome(lambda: None) == "accepted"
    bench.before[kind.name] = (1, unspoilt[1])
    assert outcome(lambda: refuse("featinv-pl: error: 'in/picture.png' is none.")) == "refused"
    assert outcome(lambda: refuse("usage", 2)) == "refused"
    assert outcome(lambda: refuse("featinv-pl: error: something is wrong.")) == "unclear"
    assert outcome(lambda: refuse("Traceback")) == "unclear"
    assert outcome(lambda: [][0]) == "traceback"
    assert outcome(lambda: os.system("touch ../ran")) == "ran code"
    assert outcome(lambda: Path("../outside").write_text("changed")) == "wrote outside"
    assert outcome(lambda: Path("new").touch()) == "wrote outside"
    assert outcome(lambda: Path("in/picture.png").unlink()) == "wrote outside"
    assert outcome(lambda: time.sleep(3)) == "too slow"
    assert outcome(lambda: bytearray(3 << 30)) == "too much memory"
    assert outcome(lambda: b"x" * (1200 << 20)) == "too much memory"
    sealed = replace(kind, sealed=True)
    with monkeypatch.context() as patched:
        patched.setattr("torture.damage.main", lambda command: None)
        assert bench.trial(sealed, lambda folder: None, authored=False).outcome == "undetected"
    bench.before[kind.name] = unspoilt


def test_a_pickle_does_run_without_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all the others rely on."""
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    pickle.loads(pickle.dumps(Runs()))
    assert Path("../ran").exists()


def test_each_wrong_end_is_counted_once() -> None:
    trials = [Trial(outcome, 1.5, 20, "") for outcome in OUTCOMES]
    counted = figure("all", trials)
    assert (counted.times, counted.lost, counted.unnoticed) == (10, 6, 1)
    assert counted.note.startswith("1 refused, 1 harmless, 1 accepted, 1 undetected")
    assert counted.note.endswith("at most 1.5 s and 20 MB")
