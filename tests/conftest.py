"""Tiny real networks, made once per session, and what is drawn with them."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.image.fid import NoTrainInceptionV3

from featinv_pl.__main__ import main
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.metrics import weights as published
from featinv_pl.types import Batch
from interrupts import Validated, added, weights
from tiny import extract_digits, extraction, make_classifier, make_inverter, make_prior, short, write

ROOT = Path(__file__).parents[1]
MakeBatch = Callable[..., Batch]
Pictures = tuple[Image.Image, Image.Image]
# Modules of tests with some.
CALLBACKS = "bench,interrupts,test_changes,test_cli,test_tracking,torture"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Runs:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def random_inception(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write FID's Inception network with random weights, and let its checksum pass for the published one."""
    with monkeypatch.context() as patched:  # torch-fidelity has no way to make the network without weights
        patched.setattr(torch, "load", lambda *_, **__: {})
        patched.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        network = NoTrainInceptionV3("random", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(published, "INCEPTION", f"https://published/random-{digest}.pth")
    return path


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own folder, seed and caches, and never reaches for a network."""
    torch.set_num_threads(1)  # ten times faster than threads that wait for each other
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("HF_HUB_OFFLINE", "WANDB_SILENT"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("FEATINV_IMPORTS", CALLBACKS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("frozen"))


@pytest.fixture(scope="session")
def prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prior(tmp_path_factory.mktemp("frozen"))


@pytest.fixture
def own_prior(prior_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(prior_folder, tmp_path / "prior"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, classifier_folder: Path, prior_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("extraction")
    settings = extraction(
        classifier_folder, prior_folder, ["train", "val", "clean", "corrupted/contrast/3", "corrupted/pixelate/5"]
    )
    settings["trainer"] |= {"default_root_dir": str(folder)}
    settings["trainer"]["callbacks"][0]["init_args"]["folder"] = str(folder / "shards")
    main(["predict", "--config", write(folder / "extract.yaml", settings)])
    return folder / "shards"


@pytest.fixture
def make_batch() -> MakeBatch:
    def make(size: int, source: str = "clean", shape: tuple[int, int, int] = (8, 4, 4), seed: int = 0) -> Batch:
        rng = torch.Generator().manual_seed(seed)
        return {
            "images": torch.randint(0, 256, (size, 3, 32, 32), generator=rng) / 127.5 - 1,
            "features": torch.randn(size, *shape, generator=rng),
            "logits": torch.randn(size, 10, generator=rng),
            "moments": torch.randn(size, 8, 4, 4, generator=rng),
            "labels": torch.randint(0, 10, (size,), generator=rng),
            "source": [source] * size,
            "key": [f"{seed}-{index}" for index in range(size)],
        }

    return make


# What draws, and what it draws from


@pytest.fixture(scope="session")
def inverter_folder(tmp_path_factory: pytest.TempPathFactory, classifier_folder: Path, prior_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("viz") / "model"
    make_inverter(folder, classifier_folder, prior_folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(inverter_folder: Path) -> FeatInvPipeline:
    return FeatInvPipeline.from_pretrained(inverter_folder)


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory, classifier_folder: Path, prior_folder: Path) -> Path:
    """As seen by the classifier of the model."""
    return extract_digits(tmp_path_factory.mktemp("shards"), classifier_folder, prior_folder)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return copy_of("4", tmp_path)


@pytest.fixture
def other_picture(tmp_path: Path) -> Path:
    return copy_of("7", tmp_path)


def copy_of(digit: str, folder: Path) -> Path:
    return Path(shutil.copy(ROOT / f"docs/digits/{digit}.png", folder / f"digit-{digit}.png"))


@pytest.fixture
def opened(picture: Path, other_picture: Path) -> Pictures:
    first, second = (Image.open(path).convert("RGB") for path in (picture, other_picture))
    return first, second


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a browser."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium on this machine: on Debian, apt-get install chromium")
    return found


# Trainings of five steps, of which every second is saved and validated


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
