"""Images of one's own: the page of the docs, as a user follows it."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from featinv_pl.__main__ import main

PROJECT = Path(__file__).parents[1]
PAGE = (PROJECT / "docs/own.md").read_text()
[VALUES] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
[COMMANDS] = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
OURS = {"folder": "photos", "image_size": "16", "classes": "3"}
# What makes it short, beyond `debug.yaml`, by the file of the line.
LESS = {"inverter": "--model.sampler.steps=2", "corrupted": "--data.severities=[3]"}


def lines() -> list[list[str]]:
    """The words after `featinv-pl` of each line, made short where it computes."""
    found = []
    for line in COMMANDS.splitlines():
        command, *words = shlex.split(line, comments=True)
        assert command == "featinv-pl"
        for name in re.findall(r"experiments/own/(\w+)\.yaml", line):
            words += ["--config", "experiments/debug.yaml", *LESS.get(name, "").split()]
        found.append(words)
    return found


@pytest.fixture
def experiments() -> Path:
    """The folder of experiments with the three values changed, and three classes of photos."""
    folder = Path("experiments")
    shutil.copytree(PROJECT / "experiments/own", folder / "own")
    for name in ("trainer.yaml", "debug.yaml"):
        shutil.copy(PROJECT / "experiments" / name, folder)
    own = folder / "own/own.yaml"
    text = own.read_text()
    assert list(re.findall(r"^  (\w+):", text, re.MULTILINE))[:3] == list(OURS)
    for name, value in OURS.items():
        [shown] = re.findall(rf"^  {name}: (\S+)", VALUES, re.MULTILINE)
        text, count = re.subn(rf"^  {name}: {shown}\b", f"  {name}: {value}", text, flags=re.MULTILINE)
        assert count == 1, f"own.yaml and the page differ in {name}"
    own.write_text(text)
    for name in ("ant", "bee", "owl"):
        for number in range(10):
            path = Path(f"photos/{name}/{number}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((30, 24), 80).convert("RGB").save(path)
    return folder


def test_every_file_is_on_the_page(experiments: Path) -> None:
    files = {path.stem for path in (experiments / "own").iterdir()}
    assert files == {"own", *re.findall(r"--config experiments/own/(\w+)\.yaml", COMMANDS)}


def test_the_page_runs_from_classifier_to_report(experiments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the test set that may be left out, which then is a note."""
    left_out = [words for words in lines() if "corrupted" in " ".join(words)]
    for words in lines():
        if words not in left_out:
            main(words)
    assert {path.name for path in Path("runs").iterdir()} == {"own"}
    found = json.loads(Path("runs/own/inverter/metrics.json").read_text())
    assert "cosine" in found["scores"]["test"]["inversion"]
    [note] = [note for note in found["notes"] if note.startswith("test-corrupted")]
    assert note.startswith("test-corrupted: left out, for there is no folder 'runs/own/shards/test-corrupted'")
    assert note in capsys.readouterr().err
    page = Path("runs/own/report.html").read_text()
    assert "test-corrupted: left out" in page
    assert "Set <code>inception</code> to <code>download</code>" in page
    counts = {path.parent.name: json.loads(path.read_text())["samples"] for path in Path("runs").rglob("manifest.json")}
    assert counts == {"train": 16, "val": 3, "test": 3}  # of 24, of which debug.yaml takes two batches of 8
    [words] = left_out
    main(words)
    assert len(list(Path("runs/own/shards/test-corrupted").rglob("manifest.json"))) == 5
