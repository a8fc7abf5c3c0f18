"""The benchmark measures, on tiny networks, what it will measure at full size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import machine, training
from bench.__main__ import main, tiny_options
from bench.training import AGAIN, SAVINGS
from interrupts import Capture


@pytest.fixture
def tiny(classifier_folder: Path, prior_folder: Path) -> list[str]:
    return tiny_options(classifier_folder, prior_folder)


def test_savings_and_ways_have_their_figures(tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    names = ["bf16", "again"]
    monkeypatch.setattr(training, "NAMES", {name: {**SAVINGS, **AGAIN}[name] for name in names})
    recipes = {title: recipe for title, recipe in training.RECIPES.items() if recipe[0] in names}
    monkeypatch.setattr(training, "RECIPES", recipes)
    monkeypatch.setattr(machine, "product_rates", lambda: {"float32": 1e9, "bfloat16": 1e9})
    main(
        [
            "--parts",
            "training",
            "sampling",
            "--rounds=1",
            "--steps=2",
            "--long",
            "3",
            "2",
            *(f"--option={one}" for one in tiny),
        ]
    )
    found = json.loads(Path("runs/bench/bench.json").read_text())
    configurations = {one["name"]: one for one in found["training"]["configurations"]}
    assert [*configurations] == names
    assert configurations["again"]["flops"] > configurations["bf16"]["flops"]
    assert all(one["rate"] > 0 and one["peak"] > 0 and len(one["seconds"]) == 2 for one in configurations.values())
    rows = [row.split(" | ") for row in capsys.readouterr().out.splitlines() if row.count(" | ") == 4]
    differences = [float(row[3]) for row in rows if row[3][0].isdigit()]
    assert len(differences) == len(found["sampling"]["ratios"])
    assert max(differences[:3]) < 1e-5 < differences[3] < 0.1  # what is saved changes nothing, but for half precision


def test_full_size_wants_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "total_memory", lambda: 8.0)
    with pytest.raises(SystemExit, match=r"wants 19 GiB, and there are 8\. Measure the rest: --parts startup digits"):
        main([])


@pytest.mark.parametrize(
    ("command", "unwanted"),
    [
        (["--help"], ["torch", "lightning", "yaml", "numpy"]),
        (["reconstruct", "--help"], ["torch", "lightning"]),
        pytest.param(
            ["fit", "--trainer.max_stepz", "3"],
            ["sklearn", "pandas", "gradio", "transformers.models.clip"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_command_imports_no_more_than_it_needs(command: list[str], unwanted: list[str]) -> None:
    code = (
        "import sys\nfrom featinv_pl.__main__ import main\n"
        f"try: main({command})\nexcept SystemExit: pass\n"
        f"print([name for name in {unwanted} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
