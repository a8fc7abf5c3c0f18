"""What the README says can be run, runs or is at least understood."""

import re
import subprocess
from pathlib import Path

import pytest

from featinv_pl.__main__ import main
from featinv_pl.cli import effective_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"`featinv-pl ((?:fit|predict|test) --config [^`]+)`", README)))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # The checkpoint is a run's result, so it need not be there.
    effective_config(re.sub(r" --ckpt_path \S+", "", command).split())


def test_overrides_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = re.findall(r"`(--(?:model|trainer|data)\.[\w.-]+[= ][^`]+)`", README)
    assert len(options) >= 4
    for option in options:
        effective_config(["fit", "--config", "experiments/digits/spatial.yaml", *option.split()])


def test_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "FeatureInversion"])
    assert "Probability with which training replaces map and prompt together" in " ".join(
        capsys.readouterr().out.split()
    )


def test_make_targets_exist() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"`?make (\w+)", README))
    assert named >= {"demo", "test", "install", "help"}
    for target in (*named, "install", "demo", "test", "lint", "types", "format", "check", "bench", "clean"):
        assert re.search(rf"^  {target} ", listed, re.MULTILINE), target


def test_files_exist() -> None:
    for name in re.findall(r"`((?:src|experiments)/[\w/.]+)`", README) + re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / name).exists(), name
