"""Workflows of `experiments`, in short: what runs, is reused, and is left by an interruption; and `make smoke`."""

import json
import re
import runpy
import shutil
import subprocess
from math import nan
from pathlib import Path
from typing import Any

import layers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from featinv_pl.__main__ import main
from interrupts import Capture
from smoke.__main__ import attempt
from smoke.files import SHIPPED, TAKEN_ALONG, bases, jobs
from smoke.parts import make_parts
from smoke.targets import PROJECT, TARGETS, make, run_here, started
from tiny import extraction, inversion, write

SNAKEFILE = """
FOLDER = "runs"
STEPS = {
    "first": {"command": "--version --config a.yaml", "makes": ["made"], "needs": []},
    "second": {"command": "--version --config b.yaml", "makes": [], "needs": ["first"]},
    "other": {"command": "--version --config c.yaml", "makes": [], "needs": []},
}

rule all:
    input: lambda wildcards: [done(name) for name in STEPS]

include: "../workflow.smk"
"""


def test_steps_run_again_when_what_they_depend_on_has_changed() -> None:
    """Of a small workflow, whose commands take no time."""
    Path("experiments/digits").mkdir(parents=True)
    for name in ("workflow.smk", "step.sh"):
        Path("experiments", name).symlink_to(PROJECT / "experiments" / name)
    Path("experiments/digits/Snakefile").write_text(SNAKEFILE)
    Path("made").touch()
    files = {"a.yaml": "name: a", "b.yaml": "base: base.yaml", "c.yaml": "name: c", "base.yaml": "seed: 1"}

    def runs(**changed: str) -> list[str]:
        """The configurations whose steps `make demo` runs, after some have changed."""
        for name, content in (files | {f"{name}.yaml": content for name, content in changed.items()}).items():
            Path(name).write_text(content)
        return sorted(command[-1] for command in started(make("demo", short=False)))

    assert runs() == ["a.yaml", "b.yaml", "c.yaml"]
    assert runs(a="name: a # as before", base="seed: 2") == ["b.yaml"]
    assert runs(a="name: other") == ["a.yaml", "b.yaml"]
    assert runs() == []  # which is there


def step(digest: str, script: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROJECT / "experiments/step.sh"), "runs", "a name", digest, "runs/model", "bash", "-c", script]
    return subprocess.run(["bash", *command], text=True, capture_output=True)


def test_an_interrupted_step_resumes_and_a_changed_one_starts_over() -> None:
    begin = "mkdir -p runs/model && echo begun >> runs/model/file && echo a line"
    failed = step("one", f"{begin} && exit 3")
    assert (failed.returncode, failed.stderr) == (3, "a line\n")
    assert not Path("runs/steps/a name.one").exists()
    assert step("one", begin).returncode == 0
    assert Path("runs/model/file").read_text() == "begun\nbegun\n"
    assert Path("runs/steps/a name.one").read_text().strip().isdigit()
    assert Path("runs/steps/a name.log").read_text() == "a line\na line\n"

    assert step("two", begin).returncode == 0
    assert Path("runs/model/file").read_text() == "begun\n"
    [moved] = Path("runs/earlier/a name").iterdir()
    assert (moved / "file").read_text() == "begun\nbegun\n"  # not deleted


def test_starting_over_keeps_what_is_there() -> None:
    Path("experiments/digits").mkdir(parents=True)
    Path("experiments/digits/Snakefile").write_text("rule all:\n    shell: 'mkdir runs/demo'\n")
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/mine").touch()
    make("demo", short=False, FRESH="1")
    assert not any(Path("runs/demo").iterdir())
    [kept] = Path("runs").glob("demo-*")
    assert (kept / "mine").exists()


SETS = ("train", "val", "clean", "adversarial")


def test_demo() -> None:
    shutil.copytree(PROJECT / "experiments", "experiments")
    for name, key in (("extract", "sources"), ("inversion", "test")):  # without those that take most time
        path = Path(f"experiments/digits/{name}.yaml")
        settings = yaml.safe_load(path.read_text())
        given = settings["data"]["init_args"]
        kept = [one for one in given[key] if one in SETS]
        given[key] = kept if key == "sources" else {one: given[key][one] for one in kept}
        path.write_text(yaml.safe_dump(settings))
    planned = make("demo", FLAGS="--dry-run --printshellcmds")
    commands = started(planned)
    assert sorted(command[0] for command in commands) == [*["fit"] * 5, *["predict"] * 2, "report", *["test"] * 2]
    run_here(planned)
    make("demo", FLAGS="--until stages")
    main(["report", "runs/demo"])

    runs = Path("runs/demo")
    metrics = json.loads((runs / "metrics.json").read_text())
    assert set(metrics) == {"spatial", "pooled"}
    for source in ("clean", "adversarial"):
        spatial, pooled = (metrics[name]["scores"][source] for name in ("spatial", "pooled"))
        for baseline in ("inversion", "floor", "ceiling", "neighbour"):
            assert {"cosine", "agreement@1", "agreement@5"} <= spatial[baseline].keys()
        assert "fd_test_convnext2" in pooled["inversion"]
    stages = json.loads((runs / "stages.json").read_text())
    assert len(stages) == 9
    page = (runs / "report.html").read_text()
    assert all(stage["command"] in page for stage in stages.values())

    # A step whose result is gone runs again, alone; all else is reused.
    (runs / "pooled/scores.csv").unlink()
    again = [command[:3] for command in started(make("demo", FLAGS="--dry-run"))]
    assert again == [["test", "--config", "experiments/digits/pooled.yaml"], ["report", "runs/demo"]]


TABLE = runpy.run_path(str(PROJECT / "experiments/study/table.py"))
SCORES, Row, markdown = TABLE["SCORES"], TABLE["Row"], TABLE["markdown"]


@pytest.fixture
def plan(classifier_folder: Path, prior_folder: Path) -> dict[str, Any]:
    extract = extraction(classifier_folder, prior_folder, ["train", "val"])
    extract["trainer"]["limit_predict_batches"] = 1
    extract["data"]["init_args"]["batch_size"] = 16
    inverter = inversion(classifier_folder, prior_folder)
    saver, evaluation = inverter["trainer"]["callbacks"]
    del inverter["seed_everything"], inverter["trainer"]["default_root_dir"]
    evaluation["init_args"] |= {"clean": "val", "judge": str(classifier_folder)}
    inverter["trainer"]["val_check_interval"] = 1
    options = {**evaluation["init_args"], "samplers": {"best": {"steps": 2, "best_of": 2}}}
    several = {"callbacks": [saver, {**evaluation, "init_args": options}]}
    inverter["data"]["init_args"]["test"] = {"val": "shards/val"}
    less = {"trainer": {"max_steps": 1}, "model": {"init_args": {"adapt": {"train": "encoder"}}}}
    return {
        "folder": "study",
        "needs": [str(classifier_folder)],
        "prepare": {
            "shards": {"command": f"predict --config {write(Path('extract.yaml'), extract)}", "makes": ["shards"]}
        },
        "config": write(Path("inverter.yaml"), inverter),
        "source": "val",
        "seeds": [3],
        "runs": {"plain": {"set": {"trainer": several}}, "with less": {"set": less, "adapts": "plain"}},
    }


def study(plan: dict[str, Any], flags: str = "") -> str:
    """Run a plan by a target that does not begin with the demo."""
    Path("plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return make("study-cifar10", short=False, STUDY="plan.yaml", FLAGS=flags)


def test_study(plan: dict[str, Any]) -> None:
    planned = study(plan, "--dry-run --printshellcmds")
    assert sorted(command[0] for command in started(planned)) == ["export", "fit", "fit", "predict", "test", "test"]
    run_here(planned)
    # A change of a run runs it again, and not what it starts from.
    plan["runs"]["with less"]["set"]["trainer"]["max_steps"] = 2
    printed = study(plan, "--dry-run")
    assert [command[0] for command in started(printed)] == ["fit", "test"]

    assert "| plain | best |" in printed
    rows = json.loads(Path("study/study.json").read_text())
    assert [(row["run"], row["sampler"]) for row in rows] == [("plain", "own"), ("plain", "best"), ("with less", "own")]
    for row in rows:
        for score in SCORES:
            assert len(row["scores"][score]) in (0, 1), score  # a tiny network's ceiling may lie below its floor
        assert len(row["scores"]["agreement@1"]) == 1
    assert Path("study/study.md").read_text() in printed
    assert Path("study/study.png").read_bytes().startswith(b"\x89PNG")
    sheet = Image.open("study/pictures.png")
    assert sheet.height == 4 * 32 + 3 * 3  # originals and three rows
    first = sheet.crop((sheet.width - 96, 0, sheet.width, 32))
    assert first.tobytes() == Image.open("study/plain/3/pictures/val/first/original.png").tobytes()
    layers.main("plan.yaml", "--short")
    assert "| plain |" in Path("study/layers.md").read_text()
    curves = json.loads(Path("study/layers.json").read_text())["diversity"]
    assert [len(curve) for curve in curves["with less"]] == [102, 102]  # of each image
    settings = yaml.safe_load(Path("study/with less/3/fit.yaml").read_text())
    assert settings["seed_everything"] == 3
    assert settings["model"]["init_args"]["adapt"] == {"control": "study/plain/3/model", "train": "encoder"}
    assert settings["trainer"]["max_steps"] == 1


def test_a_failed_run_does_not_stop_the_others(plan: dict[str, Any], capsys: Capture) -> None:
    """Of commands that take no time."""
    commands = {"b": "none", "a": "--version"}
    prepare = {name: {"command": line, "makes": []} for name, line in commands.items()}
    with pytest.raises(AssertionError, match="Error 1"):
        study({**plan, "prepare": prepare, "runs": {}})
    assert "there is no command 'none'" in Path("study/steps/b.log").read_text()
    assert "error" not in Path("study/steps/a.log").read_text()
    assert Path("study/study.md").exists()
    with pytest.raises(AssertionError, match="Error"):
        study({**plan, "needs": ["nowhere"]})
    assert "The study needs 'nowhere'. Make it first" in capsys.readouterr().out


def test_table_says_mean_interval_and_what_part_of_the_gap_is_closed(tmp_path: Path) -> None:
    def row(run: str, *calibrated: float) -> Any:
        return Row(run, "own", dict.fromkeys(SCORES, calibrated))

    rows = [row("authors", 0.8, 0.9, 0.7), row("better", 0.9, 0.9, 0.9), row("one", 0.6), row("none")]
    _, _, authors, better, one, none = (line.strip("|\n ").split(" | ") for line in markdown(rows).splitlines())
    # Student's t for two degrees of freedom is 4.303; the standard deviation 0.1.
    assert authors[2] == f"0.800 ± {4.3027 * 0.1 / 3**0.5:.3f}"
    assert better[2] == "0.900 ± 0.000"
    assert one[2] == "0.600"
    assert [line[-2:] for line in (authors, better, one)] == [["0%", "3"], ["50%", "3"], ["-100%", "1"]]
    assert set(none[2:-1]) == {""}


def test_diversity_counts_samples_that_reach_a_fidelity() -> None:
    levels = torch.tensor([[0.0, 0.2, 0.6], [0.0, 1.0, 1.0]])
    images = levels[..., None, None, None].expand(-1, -1, 3, 4, 4) * 2 - 1
    rows = layers.open_at(torch.tensor([[0.905, 0.505, 0.705], [0.305, 0.805, 0.205]]), images)
    grid = layers.GRID.round(2).tolist()
    at = [grid.index(fidelity) for fidelity in (0.0, 0.3, 0.6, 0.8)]
    expected = [[(0.2 + 0.6 + 0.4) / 3, (0.2 + 0.6 + 0.4) / 3, 0.6, nan], [2 / 3, 1.0, nan, nan]]
    np.testing.assert_allclose(rows[:, at], expected, atol=1e-6)
    # All images have two samples up to 0.3, and half of them, the first alone, up to 0.7.
    place, counted = layers.equal_fidelity({"one": rows, "other": rows})
    assert (grid[place], counted.tolist()) == (0.7, [True, False])


OTHERS = {"help", "install", "smoke", "test", "coverage", "lint", "types", "docs", "format", "check", "clean"}


def test_every_file_and_every_target_is_run() -> None:
    shipped = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.yaml")}
    assert {*jobs(), *bases(), *TAKEN_ALONG} == shipped
    found = set(re.findall(r"^([a-z0-9-]+):.*?## ", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    studies = {f"study{name}" for name in ("", "-cifar10", "-choices", "-photos", "-layers", "-layers-photos")}
    assert found - OTHERS == {*TARGETS, "demo", *studies}


def test_a_file_is_run(tmp_path: Path) -> None:
    """Others, from pretraining to sweeps, have tests of their own."""
    make_parts(tmp_path, ["resnet50"])
    name = "imagenet/extract/resnet50.yaml"
    good, row = attempt(name, jobs()[name])
    assert good, row
