"""What the README says can be run, runs or is at least understood."""

import re
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from configurations import effective_config
from featinv_pl.__main__ import main
from featinv_pl.commands import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
VIZ = (ROOT / "docs/viz.md").read_text()
PAGES = (README, (ROOT / "experiments/imagenet/README.md").read_text(), VIZ)


def shell_commands() -> list[str]:
    """Every `featinv-pl` command of the pages that is whole, in text or in a block."""
    found = set()
    for page in PAGES:
        found |= set(re.findall(r"`(featinv-pl (?:fit|predict|test) --config [^`]+)`", page))
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found |= {" ".join(line.split()) for line in lines if line.startswith("featinv-pl")}
    return sorted(
        command for command in found if not re.search(r"\b(FILE|FOLDER|RUN|CKPT|DIR|MODEL|IMAGE|SHARDS)\b|\[", command)
    )


@pytest.mark.parametrize("command", shell_commands())
def test_command_is_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    verb, *args = command.split()[1:]
    if verb in ("fit", "predict", "test"):
        # Checkpoint and configuration of a run are its results, so they need not be there.
        line = re.sub(r" --ckpt_path \S+", "", " ".join(args))
        line = re.sub(r"runs/imagenet/(\w+)/(\w+)/fit.yaml", r"experiments/imagenet/train/\1-\2.yaml", line)
        effective_config([verb, *line.split()])
    else:
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        known = capsys.readouterr().out
        assert all(option in known for option in args if option.startswith("--"))


def test_list_of_commands_is_that_of_the_command() -> None:
    listed = re.findall(r"^featinv-pl (\S+) .* # (.*)$", README.partition("## Commands")[2], re.MULTILINE)
    assert listed == [(name, command.does) for name, command in COMMANDS.items()]


def test_pages_show_every_command_that_explores() -> None:
    shown = {command.split()[1] for command in shell_commands()}
    explore = {"concepts", "steer", "interpolate", "compose", "compare", "app"}
    assert shown >= {"export", "import", "reconstruct", "predict", "fit", *explore}


def test_python_of_the_readme_is_that_of_the_model_card() -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    card = files("featinv_pl.inverter").joinpath("model_card.md").read_text()
    assert block.replace("runs/digits-inverter", "{{ name }}").replace("docs/digits/4.png", "cat.jpg") in card


def test_overrides_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = re.findall(r"`(--(?:model|trainer|data)\.[\w.-]+[= ][^`]+)`", README)
    assert len(options) >= 4
    for option in options:
        effective_config(["fit", "--config", "experiments/digits/spatial.yaml", *option.split()])


def test_options_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "FeatureInversion"])
    assert "Probability of replacing feature map and prompt together" in " ".join(capsys.readouterr().out.split())


def test_make_targets_exist() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"`make ([\w-]+)", VIZ)) | set(re.findall(r"`?make ([\w-]+)", README))
    assert named >= {"demo", "test", "install", "help", "parity", "full-size"}
    for target in (*named, "install", "demo", "test", "lint", "types", "format", "check", "bench", "clean"):
        assert re.search(rf"^  {target} ", listed, re.MULTILINE), target


def test_files_exist() -> None:
    for name in re.findall(r"`((?:src|experiments)/[\w/.]+)`", README) + re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / name).exists(), name
    pictures = re.findall(r"\]\((viz/[^)]+)\)", VIZ)
    assert len(pictures) >= 8
    for name in pictures:
        assert 0 < (ROOT / "docs" / name).stat().st_size < 150_000, name
