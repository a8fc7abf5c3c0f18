"""A short version of `make smoke`, one file of each kind; and nothing that is shipped is left out of the long one."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from featinv_pl.__main__ import OVERLAY, run
from smoke.__main__ import attempt, prepare
from smoke.files import SHIPPED, TAKEN_ALONG, bases, jobs
from smoke.sweeps import proposal
from smoke.targets import TARGETS

PROJECT = Path(__file__).parents[1]
SHORT = (
    "imagenet/extract/resnet50-train.yaml",
    "imagenet/extract/resnet50.yaml",
    "imagenet/train/resnet50-spatial.yaml",
    "bench/authors.yaml",
)
ELSEWHERE = {"pretraining", "test", "memory", "sweep", "study"}  # kinds of which other tests run or parse a file
OTHERS = {"help", "install", "smoke", "test", "coverage", "lint", "types", "format", "check", "clean"}


def test_every_file_is_run() -> None:
    shipped = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.yaml")}
    assert {*jobs(), *bases(), *TAKEN_ALONG} == shipped


def test_every_target_is_run() -> None:
    found = set(re.findall(r"^([a-z0-9-]+):.*?## ", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert found - OTHERS == {*TARGETS, "demo", "study", "study-cifar10"}


def test_one_file_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of studies have tests of their own, as has W&B's agent, whose command line is taken here."""
    monkeypatch.setenv("FEATINV_IMPORTS", "smoke,bench")
    torch.manual_seed(0)
    prepare(tmp_path)
    known = jobs()
    assert {known[name].kind for name in SHORT} == {job.kind for job in known.values()} - ELSEWHERE
    for name in SHORT:
        row = attempt(name, known[name].act)
        assert row.result == "good", row

    sweep = yaml.safe_load((SHIPPED / "sweeps/backbones.yaml").read_text())
    args = create_sweep_command_args({"args": {option: {"value": value} for option, value in proposal(sweep).items()}})
    words = [part for item in sweep["command"][2:] for part in (args["args"] if item == "${args}" else [item])]
    monkeypatch.setenv(OVERLAY, "parts/train-resnet50.yaml")
    run(words)
    assert list(Path("runs/featinv-pl").rglob("inversion.ckpt"))
