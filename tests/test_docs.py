"""What README, `docs/` and the package say of themselves can be run, is understood, and is complete."""

import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

import featinv_pl
import featinv_pl.cli
import prose
from configurations import effective_config
from featinv_pl.__main__ import main
from featinv_pl.commands import COMMANDS
from featinv_pl.mistakes import own
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.frozen import digest
from installs import EXTRAS, PROJECT, PYTHONS, SOURCE
from interrupts import Capture
from tiny import write

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
SPATIAL = "experiments/digits/spatial.yaml"
PLACEHOLDERS = r"\b(FILE|FOLDER|COPY|RUN|CKPT|DIR|MODEL|IMAGE|SHARDS)\b|\["


def shell_commands() -> list[str]:
    """Every `featinv-pl` command of the pages that is complete, in text or in a block."""
    found = set()
    for page in (README, *PAGES.values()):
        found |= set(re.findall(r"`(featinv-pl (?:fit|predict|test) --config\s[^`]+)`", page))
        blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL) + re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)
        for block in blocks:
            lines = re.findall(r"^ *(featinv-pl .*?) *(?:#.*)?$", block.replace("\\\n", " "), re.MULTILINE)
            found |= set(lines)
    found = {" ".join(command.split()) for command in found}
    meant = {command for command in found if not re.search(PLACEHOLDERS, command) and "wrong.yaml" not in command}
    return sorted(command for command in meant if command.split()[1] in COMMANDS)


@pytest.mark.parametrize("command", shell_commands())
def test_command_is_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(ROOT)
    # Checkpoint and configuration of a run are its results, so they need not be there.
    line = re.sub(r" --ckpt_path \S+", "", command)
    line = line.replace("runs/layers/inverter/fit.yaml", "experiments/digits/spatial.yaml")
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
    listed = re.findall(r"^featinv-pl (\S+) .* # (.*)$", PAGES["commands"], re.MULTILINE)
    assert listed == [(name, command.does) for name, command in COMMANDS.items()]
    shown = {command.split()[1] for command in shell_commands()}
    assert shown == COMMANDS.keys() - {"validate"}


def test_options_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pays = re.findall(r"`(--(?:model|trainer|data)\.[^`]+=[^`]+)`", PAGES["better"])
    pages = "\n".join(PAGES[name] for name in ("start", "commands", "own", "wandb", "resuming"))
    overrides = re.findall(r"`(--(?:model|trainer)\.[\w.-]+[= ][^`]+)`", pages)
    overrides += re.findall(r"`(--data\.test[\w.-]+=[^`]+)`", pages)
    assert len(pays) >= 12
    assert len(overrides) >= 6
    effective_config(["fit", "--config", SPATIAL, *" ".join(pays).split(), *" ".join(overrides).split()])


def test_python_of_the_readme_is_that_of_the_model_card() -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    card = files("featinv_pl.inverter").joinpath("model_card.md").read_text()
    assert block.replace("runs/digits-inverter", "{{ name }}").replace("docs/digits/4.png", "cat.jpg") in card


def test_python_of_the_inputs_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    described, used = re.findall(r"```python\n(.*?)```", PAGES["inputs"], re.DOTALL)
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
    pages = "\n".join((README, *PAGES.values()))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", pages, re.MULTILINE))
    assert named >= {"demo", "test", "install", "help", "parity", "full-size"}
    for target in (*named, "lint", "types", "format", "check", "bench", "clean"):
        assert re.search(rf"^  {target} ", listed, re.MULTILINE), target


def test_files_exist() -> None:
    pages = {ROOT / "README.md": README, **{ROOT / f"docs/{name}.md": page for name, page in PAGES.items()}}
    current = [page for path, page in pages.items() if path.stem != "smoke"]  # which records what was run on a day
    named = {name for page in current for name in re.findall(r"`((?:src|experiments|tests)/[\w/.-]+)`", page)}
    assert len(named) >= 15
    assert not [name for name in named if not (ROOT / name).exists() and "NAME" not in name]
    linked = {
        path.parent / link for path, page in pages.items() for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)", page)
    }
    assert not [path for path in linked if not path.exists()]
    pictures = [path for path in linked if path.suffix in (".png", ".jpg", ".svg")]
    assert len(pictures) >= 20
    assert not [path for path in pictures if path.stat().st_size > 150_000]


def test_readme_can_be_read_in_a_minute() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    tables = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    assert tables
    assert max(table.count("\n") - 2 for table in tables) <= 6


def test_figures_of_the_readme_are_those_of_the_pages() -> None:
    """Which say with what they were measured, and when."""
    figures = set(re.findall(r"\d\.\d+\s\[\d\.\d+, \d\.\d+\]", README))
    assert len(figures) >= 6
    measured = " ".join(f"{PAGES['photos']} {PAGES['start']}".split())
    assert {" ".join(figure.split()) for figure in figures if " ".join(figure.split()) not in measured} == set()
    assert "6.7e-7" in PAGES["parity"]


def test_readme_cites_the_paper_of_the_citation() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    [entry] = re.findall(r"```bibtex\n(.*?)```", README, re.DOTALL)
    fields = dict(re.findall(r"(\w+) += \{(.*)\}", entry))
    people = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert fields == {
        "title": paper["title"],
        "author": " and ".join(people),
        "journal": paper["journal"],
        "year": str(paper["year"]),
    }


def test_questions_quote_messages() -> None:
    quoted = re.findall(r"^### `(.*)`$", PAGES["faq"], re.MULTILINE)
    source = "\n".join(path.read_text() for path in [ROOT / "Makefile", *(ROOT / "src").rglob("*.py")])
    assert len(quoted) >= 7
    assert [message for message in quoted if message not in source] == []


def test_the_api_has_every_public_class() -> None:
    shown = set(re.findall(r"^::: [\w.]+\.(\w+)$", PAGES["api"], re.MULTILINE))
    public = {one.__name__ for one in map(partial(getattr, featinv_pl), featinv_pl.__all__) if isinstance(one, type)}
    shipped = "\n".join(path.read_text() for path in (ROOT / "experiments").rglob("*.yaml"))
    in_yaml = set(re.findall(r"class_path: (?:featinv_pl\.[\w.]+\.)?(\w+)", shipped))
    ours = {one.__name__ for group in ("model", "data", "callbacks") for one in own(group)}
    assert public - {"str"} | in_yaml & ours <= shown


def test_prose() -> None:
    assert [fault for page in prose.PAGES for fault in prose.faults(page)] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The eye sees it.", "say classifier"),
        ("A run goes on\nagain.", "say continue, or resume"),
        ("The lock is no barrier.", "say is not a"),
        ("The calibrated cosine rises.", "'calibrated' is not explained"),
        ("A very unique map.", "uncomparables"),
    ],
)
def test_prose_that_is_to_mend(text: str, said: str) -> None:
    Path("page.md").write_text(f"# An `arm`\n\nThe *floor*, explained. The floor.\n\n{text}\n")
    faults = prose.faults(Path("page.md").resolve())
    assert any(said in fault for fault in faults)


def test_the_site_is_complete_and_fetches_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Every warning is an error: links, anchors, pages outside the navigation, names of the API, addresses."""
    site = Path("site").resolve()
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site)))
    assert {path.stem for path in site.glob("*.html")} == {*PAGES, "index", "contributing", "changelog", "404"}
    home = (site / "index.html").read_text()
    assert 'src="photos/readme.jpg"' in home
    assert 'href="contributing.html"' in home
    assert (site / "experiments/viz.ipynb").exists()
    assert "Reconstruct" in (site / "api.html").read_text()


def test_the_table_is_that_of_the_plan() -> None:
    """Every run and every sampler of the plan has its row, and no other."""
    plan = yaml.safe_load((ROOT / "experiments/study/digits.yaml").read_text())
    expected = {
        (name, sampler)
        for name, run in plan["runs"].items()
        for callback in [{}, *run["set"].get("trainer", {}).get("callbacks", [])]
        for sampler in ("own", *callback.get("init_args", {}).get("samplers", {}))
    }
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| \d\.\d+ ± .* 3 \|$", PAGES["better"], re.MULTILINE)
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


@pytest.mark.parametrize("page", ["docs/install.md", "docs/viz.md", "Dockerfile"])
def test_extras_that_are_named_exist(page: str) -> None:
    text = (PROJECT / page).read_text()
    named = {extra for given in re.findall(r"featinv-pl\[([\w,]+)\]", text) for extra in given.split(",")}
    named |= {extra for given in re.findall(r"EXTRAS=([\w,]+)", text) for extra in given.split(",")}
    assert named
    assert named | {*EXTRAS} <= SAID["optional-dependencies"].keys()
