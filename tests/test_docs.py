"""What README, `docs/` and the package say of themselves can be run, is understood, and is complete."""

import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml

from configurations import effective_config
from featinv_pl.__main__ import main
from featinv_pl.commands import COMMANDS
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.frozen import digest
from installs import EXTRAS, PROJECT, PYTHONS, SOURCE
from interrupts import Capture
from tiny import write

ROOT = Path(__file__).parents[1]
README, IMAGENET = ((ROOT / name).read_text() for name in ("README.md", "experiments/imagenet/README.md"))
VIZ, DATA, BETTER, RELIABILITY, INPUTS = (
    (ROOT / f"docs/{name}.md").read_text() for name in ("viz", "data", "better", "reliability", "inputs")
)
SPATIAL = "experiments/digits/spatial.yaml"
PLACEHOLDERS = r"\b(FILE|FOLDER|RUN|CKPT|DIR|MODEL|IMAGE|SHARDS)\b|\["


def shell_commands() -> list[str]:
    """Every `featinv-pl` command of the pages that is complete, in text or in a block."""
    found = set()
    for page in (README, VIZ, DATA, RELIABILITY, INPUTS, IMAGENET):
        found |= set(re.findall(r"`(featinv-pl (?:fit|predict|test) --config [^`]+)`", page))
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
            lines = re.findall(r"^(featinv-pl .*?) *(?:#.*)?$", block.replace("\\\n", " "), re.MULTILINE)
            found |= {" ".join(line.split()) for line in lines}
    return sorted(command for command in found if not re.search(PLACEHOLDERS, command))


@pytest.mark.parametrize("command", shell_commands())
def test_command_is_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(ROOT)
    # Checkpoint and configuration of a run are its results, so they need not be there.
    line = re.sub(r" --ckpt_path \S+", "", command)
    line = re.sub(r"runs/imagenet/(\w+)/(\w+)/fit.yaml", r"experiments/imagenet/train/\1-\2.yaml", line)
    own = yaml.safe_load((ROOT / "experiments/digits/extract.yaml").read_text())
    own |= {"base": str(ROOT / "experiments/digits/trainer.yaml"), "data": {"class_path": "FolderData"}}
    verb, *args = shlex.split(line.replace(" extract.yaml", f" {write(tmp_path / 'extract.yaml', own)}"))[1:]
    if verb in ("fit", "predict", "test"):
        effective_config([verb, *args])
    else:
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        known = capsys.readouterr().out
        assert all(option in known for option in args if option.startswith("--"))


def test_pages_show_every_command() -> None:
    section = README.partition("## Commands")[2].partition("\n## ")[0]
    listed = re.findall(r"^featinv-pl (\S+) .* # (.*)$", section, re.MULTILINE)
    assert listed == [(name, command.does) for name, command in COMMANDS.items()]
    shown = {command.split()[1] for command in shell_commands()}
    assert shown == COMMANDS.keys() - {"validate"}


def test_options_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pays = re.findall(r"`(--(?:model|trainer|data)\.[^`]+=[^`]+)`", BETTER)
    overrides = re.findall(r"`(--(?:model|trainer|data)\.[\w.-]+[= ][^`]+)`", README)
    assert len(pays) >= 12
    assert len(overrides) >= 4
    effective_config(["fit", "--config", SPATIAL, *" ".join(pays).split(), *" ".join(overrides).split()])


def test_python_of_the_readme_is_that_of_the_model_card() -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    card = files("featinv_pl.inverter").joinpath("model_card.md").read_text()
    assert block.replace("runs/digits-inverter", "{{ name }}").replace("docs/digits/4.png", "cat.jpg") in card


def test_python_of_the_inputs_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    described, used = re.findall(r"```python\n(.*?)```", INPUTS, re.DOTALL)
    Path("my_models.py").write_text(described)
    monkeypatch.syspath_prepend(".")
    monkeypatch.setenv("FEATINV_IMPORTS", "my_models")
    net = Backbone("my_models.Net")
    torch.save(net.model.state_dict(), "net.pth")
    trained = Backbone("my_models.trained")
    assert (net.layer, trained.layer, trained.feature_shape) == ("features", "features.0", (16, 8, 8))
    names = {"net": net.model, "transform": type(net.model).transform, "Backbone": Backbone}
    exec(used.splitlines()[0], names)
    assert digest(names["backbone"].model) == digest(trained.model)


def test_make_targets_exist() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = {name for page in (README, VIZ, BETTER) for name in re.findall(r"(?:^|`)make ([\w-]+)", page, re.MULTILINE)}
    assert named >= {"demo", "test", "install", "help", "parity", "full-size"}
    for target in (*named, "lint", "types", "format", "check", "bench", "clean"):
        assert re.search(rf"^  {target} ", listed, re.MULTILINE), target


def test_files_exist() -> None:
    names = re.findall(r"`((?:src|experiments)/[\w/.]+)`", README) + re.findall(r"\]\((docs/[^)]+)\)", README)
    names += [f"docs/{name}" for name in re.findall(r"\]\(([\w./-]+)\)", BETTER)]
    assert not [name for name in names if not (ROOT / name).exists()]
    pictures = re.findall(r"\]\((viz/[^)]+)\)", VIZ)
    assert len(pictures) >= 8
    assert all(0 < (ROOT / "docs" / name).stat().st_size < 150_000 for name in pictures)


def test_the_table_is_that_of_the_plan() -> None:
    """Every run and every sampler of the plan has its row, and no other."""
    plan = yaml.safe_load((ROOT / "experiments/study/digits.yaml").read_text())
    expected = {
        (name, sampler)
        for name, run in plan["runs"].items()
        for callback in [{}, *run["set"].get("trainer", {}).get("callbacks", [])]
        for sampler in ("own", *callback.get("init_args", {}).get("samplers", {}))
    }
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| \d\.\d+ ± .* 3 \|$", BETTER, re.MULTILINE)
    assert set(rows) == expected


PROJECT_TABLE = tomllib.loads((PROJECT / "pyproject.toml").read_text())
SAID = PROJECT_TABLE["project"]


def test_metadata_is_that_of_the_citation() -> None:
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert [author["name"] for author in SAID["authors"]] == [author["name"] for author in citation["authors"]]
    assert SAID["license"] == citation["license"]
    assert citation["preferred-citation"]["url"] in SAID["urls"].values()
    assert len(SAID["keywords"]) >= 5
    pythons = {one.rpartition(" ")[2] for one in SAID["classifiers"] if re.search(r":: 3\.\d+$", one)}
    assert pythons == {*PYTHONS}


def test_every_file_beside_the_code_is_shipped() -> None:
    package = SOURCE / "featinv_pl"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    others = {name for name in files if not name.endswith((".py", ".pyc"))}
    patterns = PROJECT_TABLE["tool"]["setuptools"]["package-data"]["featinv_pl"]
    assert others
    assert {name for name in others if not any(fnmatch(name, pattern) for pattern in patterns)} == set()
    assert [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in others)] == []


def test_every_bound_says_why() -> None:
    """In `pyproject.toml`, on the line of the bound."""
    text = (PROJECT / "pyproject.toml").read_text()
    for bound in SAID["dependencies"]:
        assert re.search(r"[>~=]=", bound), bound
        assert re.search(re.escape(f'"{bound}",') + r"\s+# \w", text), bound


@pytest.mark.parametrize("page", ["README.md", "docs/install.md", "docs/viz.md", "Dockerfile"])
def test_extras_that_are_named_exist(page: str) -> None:
    text = (PROJECT / page).read_text()
    named = {extra for given in re.findall(r"featinv-pl\[([\w,]+)\]", text) for extra in given.split(",")}
    named |= {extra for given in re.findall(r"EXTRAS=([\w,]+)", text) for extra in given.split(",")}
    assert named
    assert named | {*EXTRAS} <= SAID["optional-dependencies"].keys()
