"""Fixtures: trainings of five steps, of which every second is saved and validated."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featinv_pl.__main__ import main
from interrupts import Validated, added, weights
from tiny import inversion, write


def short(classifier_folder: Path, prior_folder: Path, shards: Path) -> dict[str, Any]:
    settings = inversion(classifier_folder, prior_folder, shards)
    saver = {"filename": "inversion", "every_n_train_steps": 2, "enable_version_counter": False}
    settings["trainer"] |= {
        "max_steps": 5,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
        "enable_progress_bar": False,
        "callbacks": [
            {"class_path": "MovingAverage", "init_args": {"decay": 0.5}},
            {"class_path": "ModelCheckpoint", "init_args": saver},
        ],
    }
    settings["data"]["init_args"] |= {"batch_size": 16, "test": {}}
    return settings


@pytest.fixture
def settings(shards: Path, classifier_folder: Path, prior_folder: Path) -> dict[str, Any]:
    return short(classifier_folder, prior_folder, shards)


@pytest.fixture
def fit(settings: dict[str, Any]) -> list[str]:
    return ["fit", "--config", write(Path("fit.yaml"), settings)]


@pytest.fixture(scope="session")
def uninterrupted_run(
    tmp_path_factory: pytest.TempPathFactory, shards: Path, classifier_folder: Path, prior_folder: Path
) -> Path:
    """The folder of a training to which nothing happens, which validated `Validated.keys`."""
    Validated.keys.clear()
    torch.set_num_threads(1)  # as in the tests that it is compared with
    folder = tmp_path_factory.mktemp("uninterrupted")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATINV_IMPORTS", "interrupts")
        config = write(Path("fit.yaml"), short(classifier_folder, prior_folder, shards))
        main(["fit", "--config", config, "--ckpt_path=last", *added("Validated")])  # which has nothing to resume from
    (folder / "validated.json").write_text(json.dumps(Validated.keys))
    return folder / "run"


@pytest.fixture
def uninterrupted(uninterrupted_run: Path) -> tuple[dict[str, Tensor], dict[int, list[str]]]:
    """Its weights and validated samples."""
    validated = json.loads((uninterrupted_run.parent / "validated.json").read_text())
    return weights(uninterrupted_run / "inversion.ckpt"), {int(step): keys for step, keys in validated.items()}
