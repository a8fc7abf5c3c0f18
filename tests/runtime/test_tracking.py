"""Runs at Weights & Biases, by its real client; and the same pictures and tables by other loggers."""

import contextlib
import csv
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from featinv_pl.__main__ import main, overlaid
from featinv_pl.errors import UserError
from featinv_pl.runtime.saving import git_state
from featinv_pl.runtime.tracking import describe, session
from interrupts import Capture
from test_cli import refused
from tiny import inversion, write
from wandb_server import KEY, Run, WandbServer, serve

ROOT = Path(__file__).parents[2]
LOGGER: dict[str, Any] = {"class_path": "WandbLogger", "init_args": {"project": "featinv-pl"}}


@pytest.fixture
def settings(
    shards: Path, classifier_folder: Path, prior_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """An experiment that logs, of a user whose home nobody should hear of, and who has said nothing to W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    project = tmp_path / "home-of-somebody" / "project"
    project.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(project.parent))
    monkeypatch.chdir(project)
    project.joinpath("shards").symlink_to(shards)
    experiment = inversion(classifier_folder, prior_folder, project / "shards")
    experiment["trainer"] |= {"logger": LOGGER, "default_root_dir": "runs/tiny/spatial", "log_every_n_steps": 1}
    experiment["trainer"]["check_val_every_n_epoch"] = None
    del experiment["data"]["init_args"]["test"]["corrupted"]
    return experiment


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with serve() as running:
        yield running


@pytest.fixture
def online(settings: dict[str, Any], server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> WandbServer:
    for name, value in {**server.environment(), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    return server


def only_run(server: WandbServer) -> Run:
    [run] = server.runs.values()
    return run


# Online or offline


@pytest.mark.parametrize(
    ("variables", "offline", "found"),
    [
        ({}, False, "offline"),
        ({"WANDB_API_KEY": KEY}, False, None),
        ({"WANDB_API_KEY": KEY}, True, "offline"),
        ({"NETRC": ""}, False, None),
        ({"WANDB_MODE": "disabled"}, False, "disabled"),
        ({"WANDB_MODE": "online"}, False, "WANDB_MODE is online, but there is no key .* `wandb login`"),
        ({"WANDB_API_KEY": "short"}, False, "WANDB_API_KEY invalid.* Run `wandb login`"),
    ],
)
def test_who_is_online(
    variables: dict[str, str], offline: bool, found: str | None, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost")
    if variables.pop("NETRC", None) is not None:
        Path.home().joinpath(".netrc").write_text(f"machine localhost\n  login user\n  password {KEY}\n")
        Path.home().joinpath(".netrc").chmod(0o600)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    refused = pytest.raises(UserError, match=found) if found and " " in found else contextlib.nullcontext()
    with refused, session():
        describe("fit", "tiny", ["spatial"], offline, None)
        assert os.environ.get("WANDB_MODE") == found
    assert dict(os.environ) == before


# What arrives


def test_what_a_run_tells(settings: dict[str, Any], online: WandbServer) -> None:
    config = write(Path("tiny.yaml"), settings)
    main(["fit", "--config", config])
    run = only_run(online)
    start = run.starts[0]
    assert (start["jobType"], start["groupName"], start["displayName"]) == ("fit", "tiny/spatial", "tiny/spatial fit")
    assert set(start["tags"]) == {"FeatureInversion", "spatial"}
    assert (run.state, run.exit_code) == ("finished", 0)

    # The whole configuration, once, as it is.
    saved = yaml.safe_load(Path("runs/tiny/spatial/fit.yaml").read_text())
    told = {name: value for name, value in run.config.items() if name != "_wandb"}
    assert set(told) == {*saved, "ckpt_path", "code", "shards"}
    assert (told["model"], told["trainer"]) == (saved["model"], saved["trainer"])
    assert told["data"]["init_args"]["train"] == "~/project/shards/train"
    assert told["shards"] == {
        f"~/project/shards/{name}": json.loads(Path("shards", name, "manifest.json").read_text())["manifest_sha256"]
        for name in ("train", "val", "clean")
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+", told["code"]["version"])
    for metric, count in (("train/loss", 2), ("train/samples_per_second", 2), ("val/cosine", 1)):
        assert len(run.values(metric)) == count, metric
    [picture] = run.values("reconstructions/val/first")
    assert picture["captions"] == ["val, first, from top to bottom: original, autoencoder, reconstruction"]
    assert run.files[picture["filenames"][0]] == next(Path("runs/tiny/spatial/wandb").rglob("first_*.png")).read_bytes()

    # Neither the key nor where the user's home is, in whatever was written or sent.
    written = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert any(path.suffix == ".wandb" for path in written)
    own = [Path("runs/tiny/spatial", name) for name in ("fit.yaml", "inversion.ckpt")]  # never sent
    for place, data in [*written.items(), *enumerate(online.received)]:
        assert KEY.encode() not in data, place
        assert place in own or b"home-of-somebody" not in data, place

    more = ["--config", config, "--ckpt_path", "runs/tiny/spatial/inversion.ckpt"]
    main(["validate", *more])
    [validation] = [other for other in online.runs.values() if other is not run]
    start = validation.starts[0]
    assert (start["jobType"], start["groupName"]) == ("validate", "tiny/spatial")
    for name in ("val/cosine", "val/cosine.floor"):
        assert validation.summary[name] == pytest.approx(run.values(name)[0], abs=1e-4)
    shown = validation.summary["scores/validate"]
    [path] = Path("runs/tiny/spatial/wandb").glob(f"run-*/files/{shown['path']}")
    table = json.loads(path.read_text())
    assert table["columns"][:3] == ["test set", "n", "method"]
    assert table["data"][0][:3] == ["val", "60", "reconstruction"]
    assert len(table["data"]) == shown["nrows"]

    # A training that resumes continues it.
    [name] = (name for name, other in online.runs.items() if other is run)
    assert torch.load("runs/tiny/spatial/inversion.ckpt", weights_only=True)["wandb_run_id"] == name
    main(["fit", *more, "--trainer.max_steps=4", "--trainer.val_check_interval=2"])
    assert len(online.runs) == 2
    assert (run.state, len(run.values("train/loss"))) == ("finished", 4)
    internal, steps = ([row[axis] for row in run.history] for axis in ("_step", "trainer/global_step"))
    assert (internal, steps) == (list(range(len(internal))), sorted(steps))  # no step is logged twice


def test_credentials_of_an_address_are_nowhere(settings: dict[str, Any], online: WandbServer) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as files:
        Thread(target=files.serve_forever, args=(0.01,), daemon=True).start()
        place = f"http://somebody:PASSWORD@127.0.0.1:{files.server_port}/shards/val?token=TOKEN"
        options = [f"--data.val={place}", "--data.cache=cache", "--trainer.max_steps=1"]
        main(["fit", "--config", write(Path("tiny.yaml"), settings), *options])
        files.shutdown()
    written = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    for where, data in [*written.items(), *enumerate(online.received)]:
        assert b"PASSWORD" not in data, where
        assert b"TOKEN" not in data, where
    assert "http://***@127.0.0.1" in Path("runs/tiny/spatial/fit.yaml").read_text()


@pytest.mark.parametrize("where", ["init_args", "dict_kwargs"])
def test_a_configuration_cannot_send_the_key_elsewhere(where: str, settings: dict[str, Any], capsys: Capture) -> None:
    elsewhere = {**LOGGER["init_args"], "settings": {"base_url": "http://elsewhere"}}
    settings["trainer"]["logger"] = {**LOGGER, where: elsewhere}
    message = ("send your W&B key by base_url", "WANDB_BASE_URL=")
    refused(["fit", "--config", write(Path("tiny.yaml"), settings)], capsys, *message)


class Failure(Callback):
    """Fails after the first step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")


def test_a_run_that_fails_is_reported_so(settings: dict[str, Any], online: WandbServer) -> None:
    settings["trainer"]["callbacks"].append({"class_path": f"{__name__}.Failure"})
    with pytest.raises(RuntimeError, match="on purpose"):
        main(["fit", "--config", write(Path("tiny.yaml"), settings)])
    assert (only_run(online).state, only_run(online).exit_code) == ("failed", 1)


class Clock(Callback):
    """A step takes a second, and a validation a hundred."""

    now = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        Clock.now += 1

    def on_validation_batch_start(self, *args: Any) -> None:
        Clock.now += 100


def test_validation_does_not_count_as_training(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    settings["trainer"]["callbacks"] = [{"class_path": f"{__name__}.Clock"}]
    settings["trainer"] |= {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs"}}, "max_steps": 4}
    settings["trainer"] |= {"limit_val_batches": 1}
    main(["fit", "--config", write(Path("tiny.yaml"), settings)])
    with Path("runs/lightning_logs/version_0/metrics.csv").open() as file:
        rates = [float(rate) for row in csv.DictReader(file) if (rate := row["train/samples_per_second"])]
    assert rates == [16.0] * 4


# Sweeps


def test_a_run_of_a_sweep_has_its_folder(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name, value in {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r", "FEATINV_CONFIG": "overlay.yaml"}.items():
        monkeypatch.setenv(name, value)
    write(Path("overlay.yaml"), {"trainer": {"max_steps": 1, "logger": False}})
    main(["fit", "--config", write(Path("tiny.yaml"), settings)])
    assert sorted(path.name for path in Path("runs/tiny/spatial/r").iterdir()) == ["fit.yaml", "inversion.ckpt"]
    with session():
        describe("fit", "tiny", ["spatial"], True, None)
        assert not {"WANDB_RUN_GROUP", "WANDB_NAME"} & set(os.environ)  # there the server names and groups


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fit --config a --model.x=1", "fit --config a --config o --model.x=1"),
        ("fit -c a --config=b --model.x=1", "fit -c a --config=b --config o --model.x=1"),
        ("fit --model.x=1", "fit --config o --model.x=1"),
    ],
)
def test_an_overlay_lies_over_files_and_beneath_options(line: str, expected: str) -> None:
    assert overlaid(line.split(), "o") == expected.split()
    assert overlaid(line.split(), None) == line.split()


# Other loggers


def test_other_loggers_take_what_they_can(settings: dict[str, Any], capsys: Capture) -> None:
    before, others = set(Path().iterdir()), ("TensorBoard", "CSV")
    loggers = [{"class_path": f"{kind}Logger", "init_args": {"save_dir": "runs", "name": kind}} for kind in others]
    settings["trainer"]["logger"] = [LOGGER, *loggers]
    config = write(Path("tiny.yaml"), settings)
    main(["fit", "--config", config])
    printed = capsys.readouterr().err
    assert "W&B: there is no key" in printed
    [hint] = re.findall(r"wandb sync (\S+)$", printed, re.MULTILINE)  # not the client's own beside it
    assert list(Path(hint).glob("run-*.wandb"))
    assert set(Path().iterdir()) - before == {Path("runs"), Path("tiny.yaml")}  # W&B's own files too
    main(["validate", "--config", config])
    training, validation = (EventAccumulator(f"runs/TensorBoard/version_{number}").Reload() for number in range(2))
    tags = {"train/loss", "train/samples_per_second", "val/cosine", "val/cosine.floor"}
    assert tags <= set(training.Tags()["scalars"])
    assert [event.step for event in training.Scalars("train/loss")] == [0, 1]
    assert "reconstructions/val/first" in training.Tags()["images"]
    [picture] = training.Images("reconstructions/val/first")
    assert (picture.step, picture.width, picture.height) == (1, 3 * 32, 3 * 32)
    assert "plots/histograms" in validation.Tags()["images"]
    [table] = validation.Tensors("scores/validate/text_summary")
    assert "| val | 60 | reconstruction |" in table.tensor_proto.string_val[0].decode()

    with Path("runs/CSV/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1"]
    told = yaml.safe_load(Path("runs/CSV/version_0/hparams.yaml").read_text())
    assert told["model"]["init_args"]["encoder"]["hidden_channels"] == 8
    assert "val/cosine" in Path("runs/CSV/version_1/metrics.csv").read_text()


# Code


def test_git_state(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *args], capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    package.joinpath("code.py").write_text("1")
    assert git_state(package) == {}
    git("init", "--quiet")
    assert git_state(package) == {}  # it lies in a repository of something else
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD")
    assert git_state(package) == {"commit": commit, "dirty": False}
    package.joinpath("code.py").write_text("2")
    assert git_state(package) == {"commit": commit, "dirty": True}
