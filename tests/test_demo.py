"""The demo, cut short by the debug overlay: all stages, reuse, and starting over."""

import json
import re
import shutil
from pathlib import Path

import pytest

from featinv_pl.__main__ import main

ROOT = Path(__file__).parents[1]


def test_demo_runs_reuses_and_starts_over(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "experiments", "experiments")
    runs = Path("runs/demo")
    runs.mkdir(parents=True)
    (runs / "leftover").touch()
    args = ["demo", "--config", "experiments/debug.yaml"]
    with pytest.raises(SystemExit):
        main(["demo", "--config", "experiments/nowhere.yaml", "--fresh"])
    assert (runs / "leftover").exists()  # a mistake removes nothing

    main([*args, "--fresh"])
    assert not (runs / "leftover").exists()
    printed = capsys.readouterr().out
    commands = re.findall(r"^\[\d+/10\] featinv-pl (\w+)", printed, re.MULTILINE)
    assert commands == ["fit", "fit", "fit", "predict", "predict", "fit", "test", "fit", "test", "report"]
    metrics = json.loads((runs / "metrics.json").read_text())
    assert set(metrics) == {"spatial", "pooled"}
    for source in ("clean", "corrupted", "hard", "adversarial"):
        spatial, pooled = (metrics[name]["scores"][source] for name in ("spatial", "pooled"))
        for arm in ("inversion", "floor", "ceiling", "neighbour"):
            assert {"cosine", "agreement@1", "agreement@5"} <= spatial[arm].keys()
        assert "fd_test_convnext2" in pooled["inversion"]
    stages = json.loads((runs / "stages.json").read_text())
    assert len(stages) == 9
    page = (runs / "report.html").read_text()
    assert all(stage["command"] in page for stage in stages.values())

    # An unchanged second run computes nothing; a stage whose output is gone runs again, alone.
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    (runs / "pooled/scores.csv").unlink()
    main(args)
    printed = capsys.readouterr().out
    assert printed.count("reused") == 8
    assert (runs / "pooled/scores.csv").is_file()
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")} == written

    # A change of configuration runs what depends on it, and nothing else.
    pooled = Path("experiments/digits/pooled.yaml")
    pooled.write_text(pooled.read_text() + "    dropout: 0.2\n")
    main(args)
    assert capsys.readouterr().out.count("reused") == 7
