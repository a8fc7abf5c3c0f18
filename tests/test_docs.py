"""Commands and options in `docs/` are understood."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from configurations import effective_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/data.md").read_text()


def test_commands_are_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^featinv-pl (predict (?:\\\n|[^#\n])+)", TEXT, re.MULTILINE)
    assert len(commands) == 3
    extract = yaml.safe_load((ROOT / "experiments/digits/extract.yaml").read_text())
    extract |= {"base": str(ROOT / "experiments/digits/trainer.yaml"), "data": {"class_path": "FolderData"}}
    (tmp_path / "extract.yaml").write_text(yaml.safe_dump(extract))
    for command in commands:
        args = shlex.split(command.replace("\\\n", " ").replace(" extract.yaml", f" {tmp_path}/extract.yaml"))
        effective_config(args)


def test_options_are_understood(tmp_path: Path) -> None:
    config = tmp_path / "extract.yaml"
    settings = {
        "trainer": {"callbacks": [{"class_path": "ShardWriter", "init_args": {"folder": "shards"}}]},
        "model": {
            "class_path": "FeatureExtraction",
            "init_args": {"backbone": "a", "autoencoder": "b", "image_size": 32},
        },
        "data": {"class_path": "FolderData"},
    }
    config.write_text(json.dumps(settings))
    images = ("--data.crop_pct=0.9", "--data.image_size=224", "--data.vertical_flip=true", "--data.views=4")
    writer = ("--trainer.callbacks.max_bad_fraction=0.1", "--trainer.callbacks.storage=int8")
    effective_config(["predict", "--config", str(config), *images, *writer])
    shards = {"class_path": "FeatureShards"}
    reading = ("--data.on_error=skip", "--data.cache=here")
    config.write_text(json.dumps({**settings, "data": shards}))
    effective_config(["predict", "--config", str(config), *reading])
    for option in (*images, *writer, *reading):
        assert option.split("=")[0] in TEXT


BETTER = (ROOT / "docs/better.md").read_text()


def test_options_that_pay_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = [found for found in re.findall(r"`(--[^`]+)`", BETTER) if not found.startswith("--sampler")]
    options = [found for found in options if "=" in found]
    assert len(options) >= 12
    for found in options:
        effective_config(["fit", "--config", "experiments/digits/spatial.yaml", *found.split()])


def test_files_of_the_study_exist() -> None:
    for name in re.findall(r"\]\(([\w./-]+)\)", BETTER):
        assert (ROOT / "docs" / name).exists(), name
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", BETTER, re.MULTILINE):
        assert f"\n{target}:" in targets


def test_the_table_is_that_of_the_plan() -> None:
    """Every run and every sampler of the plan has its row, and no other."""
    plan = yaml.safe_load((ROOT / "experiments/study/digits.yaml").read_text())
    expected = {
        (name, sampler)
        for name, run in plan["runs"].items()
        for sampler in ("own", *_samplers(run["set"].get("trainer", {}).get("callbacks", [])))
    }
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| \d\.\d+ ± .* 3 \|$", BETTER, re.MULTILINE)
    assert set(rows) == expected


def _samplers(callbacks: list[dict[str, Any]]) -> list[str]:
    return [name for one in callbacks for name in one.get("init_args", {}).get("samplers", {})]


def test_commands_of_reliability_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/reliability.md").read_text()
    commands = re.findall(r"featinv-pl (fit .*)", text)
    assert len(commands) == 3
    for command in commands:
        effective_config(shlex.split(command.replace("FILE", "experiments/digits/spatial.yaml")))


def test_the_walk_through_exports_what_it_tests() -> None:
    """The scores of the model card are those of the checkpoint that was tested."""
    text = (ROOT / "experiments/imagenet/README.md").read_text()
    assert len(set(re.findall(r"runs/imagenet/convnext/spatial/\S+\.ckpt", text))) == 1
