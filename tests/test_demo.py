"""The demo, cut short by the debug overlay: each of its public commands, the report, and that all is reused."""

import json
import shutil
from pathlib import Path

import yaml

from featinv_pl.__main__ import main
from smoke.targets import PROJECT, make, mark_done, started


def test_demo() -> None:
    shutil.copytree(PROJECT / "experiments", "experiments")
    for name, key in (("extract", "sources"), ("inversion", "test")):  # without corrupted ones, which take most time
        path = Path(f"experiments/digits/{name}.yaml")
        settings = yaml.safe_load(path.read_text())
        sets = settings["data"]["init_args"][key]
        kept = [one for one in sets if not one.startswith("corrupted")]
        settings["data"]["init_args"][key] = kept if isinstance(sets, list) else {one: sets[one] for one in kept}
        path.write_text(yaml.safe_dump(settings))
    commands = started(make("demo", FLAGS="--dry-run"))
    assert sorted(command[0] for command in commands) == [*["fit"] * 5, *["predict"] * 2, "report", *["test"] * 2]
    for command in commands[:-1]:  # in this process, which has loaded the libraries
        main(command)
    mark_done(make("demo", FLAGS="--summary"))
    make("demo", FLAGS="--until stages")
    assert started(make("demo", FLAGS="--dry-run")) == [commands[-1]]
    main(commands[-1])

    runs = Path("runs/demo")
    metrics = json.loads((runs / "metrics.json").read_text())
    assert set(metrics) == {"spatial", "pooled"}
    for source in ("clean", "hard", "adversarial"):
        spatial, pooled = (metrics[name]["scores"][source] for name in ("spatial", "pooled"))
        for baseline in ("inversion", "floor", "ceiling", "neighbour"):
            assert {"cosine", "agreement@1", "agreement@5"} <= spatial[baseline].keys()
        assert "fd_test_convnext2" in pooled["inversion"]
    stages = json.loads((runs / "stages.json").read_text())
    assert len(stages) == 9
    page = (runs / "report.html").read_text()
    assert all(stage["command"] in page for stage in stages.values())

    # A step whose result is gone runs again, alone; a training that was interrupted resumes in its folder.
    (runs / "pooled/scores.csv").unlink()
    again = [(command[0], command[2]) for command in started(make("demo", FLAGS="--dry-run"))[:-1]]
    assert again == [("test", "experiments/digits/pooled.yaml")]
