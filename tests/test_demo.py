"""The demo, cut short by the debug overlay: each of its public commands, the report, and that all is reused."""

import json
import shutil
from pathlib import Path

import yaml

from featinv_pl.__main__ import main
from smoke.targets import PROJECT, make, run_here, started

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
