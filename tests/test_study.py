"""A study through the public command: two ways of training, one that adapts the other, and what is reused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from featinv_pl.__main__ import main
from featinv_pl.explore.study import SCORES, Row, cells, dots, markdown
from tiny import extraction, inversion


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
    Path("extract.yaml").write_text(yaml.safe_dump(extract))
    Path("inverter.yaml").write_text(yaml.safe_dump(inverter))
    return {
        "folder": "study",
        "needs": [str(classifier_folder)],
        "prepare": [{"command": "predict --config extract.yaml", "makes": "shards"}],
        "config": "inverter.yaml",
        "source": "val",
        "seeds": [3, 5],
        "runs": {
            "plain": {"set": {"trainer": several}},
            "fewer": {
                "set": {
                    "trainer": {"max_steps": 1},
                    "model": {"init_args": {"train": "encoder"}},
                },
                "adapts": "plain",
            },
        },
    }


def run(plan: dict[str, Any]) -> None:
    Path("plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    main(["study", "plan.yaml"])


def test_study_compares_reuses_and_goes_on(plan: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(plan)
    rows = json.loads(Path("study/study.json").read_text())
    assert [(row["run"], row["sampler"]) for row in rows] == [("plain", "own"), ("plain", "best"), ("fewer", "own")]
    for row in rows:
        for score in SCORES:
            assert len(row["scores"][score]) in (0, 2), score  # a tiny network's ceiling may lie below its floor
        assert len(row["scores"]["agreement@1"]) == 2
    assert "| plain | best |" in Path("study/study.md").read_text()
    assert Path("study/study.png").read_bytes().startswith(b"\x89PNG")
    sheet = Image.open("study/pictures.png")
    assert sheet.height == 4 * 32 + 3 * 3  # originals and three rows
    first = sheet.crop((sheet.width - 96, 0, sheet.width, 32))
    assert first.tobytes() == Image.open("study/plain/3/pictures/val/first/original.png").tobytes()
    for seed in (3, 5):
        fit = yaml.safe_load(Path(f"study/fewer/{seed}/fit.yaml").read_text())
        assert fit["seed_everything"] == seed
        assert fit["model"]["init_args"]["control"] == f"study/plain/{seed}/model"
        assert fit["trainer"]["max_steps"] == 1
    assert "done in" in capsys.readouterr().out

    # What is done stays; what is changed, and what starts from it, runs again; what fails stops nothing.
    written = {path: path.stat().st_mtime_ns for path in Path("study").rglob("*.ckpt")}
    plan["runs"]["fewer"]["set"]["trainer"]["max_steps"] = 2
    plan["runs"]["broken"] = {"set": {"data": {"init_args": {"train": "nowhere"}}}}
    with pytest.raises(SystemExit):
        run(plan)
    output = capsys.readouterr()
    assert "reused, done before" in output.out
    assert re.search(r"Failed: study/broken/3: .*nowhere.*see study/broken/3/log.txt", output.err)
    again = {path for path, time in written.items() if path.stat().st_mtime_ns != time}
    assert again == {Path(f"study/fewer/{seed}/inversion.ckpt") for seed in (3, 5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"needs": ["nowhere"]}, "PLAN: there is no 'nowhere'"),
        ({"seeds": []}, "PLAN: 'plan.yaml' is no plan of a study"),
        ({"speed": 1}, "PLAN: 'plan.yaml' is no plan of a study"),
        ({"runs": {"a": {"adapts": "b"}}}, "the run 'a' adapts 'b', which is no run of its own"),
    ],
)
def test_bad_plans_are_refused(
    plan: dict[str, Any], change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(plan | change)
    assert message in capsys.readouterr().err
    assert not Path("study").exists()


def test_missing_plan_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["study", "plan.yaml"])
    assert "PLAN: there is no file 'plan.yaml'" in capsys.readouterr().err


def test_table_says_mean_interval_and_what_part_of_the_gap_is_closed() -> None:
    def row(run: str, *calibrated: float) -> Row:
        return Row(run, "own", dict.fromkeys(SCORES, calibrated))

    rows = [row("authors", 0.8, 0.9, 0.7), row("better", 0.9, 0.9, 0.9), row("one", 0.6), row("none")]
    _, authors, better, one, none = cells(rows)
    # Student's t for two degrees of freedom is 4.303; the standard deviation 0.1.
    assert authors[2] == f"0.800 ± {4.3027 * 0.1 / 3**0.5:.3f}"
    assert better[2] == "0.900 ± 0.000"
    assert one[2] == "0.600"
    assert none[2] == ""
    assert [line[-2:] for line in (authors, better, one, none)] == [
        ["0%", "3"],
        ["50%", "3"],
        ["-100%", "1"],
        ["", "0"],
    ]
    assert markdown(rows).splitlines()[2].startswith("| authors | own | 0.800 ± 0.248 |")
    assert dots(rows).startswith(b"\x89PNG")
