"""A study: two ways of training, of which one adapts the model of the other, and the table that compares them."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from smoke.targets import PROJECT, make, run_here, started
from tiny import extraction, inversion, write

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
    settings = yaml.safe_load(Path("study/with less/3/fit.yaml").read_text())
    assert settings["seed_everything"] == 3
    assert settings["model"]["init_args"]["adapt"] == {"control": "study/plain/3/model", "train": "encoder"}
    assert settings["trainer"]["max_steps"] == 1


def test_a_failed_run_does_not_stop_the_others(plan: dict[str, Any]) -> None:
    """Of commands that take no time."""
    commands = {"b": "none", "a": "--version"}
    prepare = {name: {"command": line, "makes": []} for name, line in commands.items()}
    with pytest.raises(AssertionError, match="Error 1"):
        study({**plan, "prepare": prepare, "runs": {}})
    assert "there is no command 'none'" in Path("study/steps/b.log").read_text()
    assert "error" not in Path("study/steps/a.log").read_text()
    assert Path("study/study.md").exists()


def test_a_study_says_what_it_needs(plan: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
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
