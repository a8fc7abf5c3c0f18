"""The benchmark measures, on tiny networks, what it will measure at full size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import counted, gpu, machine, training
from bench.__main__ import main, tiny_options
from bench.training import AGAIN, SAVINGS
from featinv_pl.sampling.sampler import Sampler
from interrupts import Capture

SYNCHRONISATIONS, COLLECTIVES, LOOP_SYNCHRONISATIONS = 2, 1, 0  # two: of Lightning, which asks for SIGTERM on rank 0
KERNELS, TRAFFIC = 2250, 2.3  # GB a sample


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


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Counted with a small UNet: neither by a training step that logs nothing, nor in the denoising loop."""
    small = {"block_out_channels": [32, 32], "layers_per_block": 1, "cross_attention_dim": counted.WIDTH}
    small |= {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    small |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
    monkeypatch.setattr(counted, "UNET", {"sample_size": 32, **small})
    _, logs_nothing, *_ = counted.training_steps(counted.full_size(tmp_path), 2)[1:]
    assert logs_nothing.kernels.total() > 200
    assert logs_nothing.synchronisations.total() <= SYNCHRONISATIONS
    assert logs_nothing.collectives.total() <= COLLECTIVES
    loop = counted.sampling_loop(counted.full_size(tmp_path), 2, Sampler(steps=3))
    assert loop.kernels.total() > 100
    assert loop.synchronisations.total() <= LOOP_SYNCHRONISATIONS


@pytest.mark.slow
def test_the_full_size_model_is_counted() -> None:
    training, denoising = counted.measure().values()
    assert training["kernels"] < KERNELS
    assert training["GB a sample"] < TRAFFIC
    assert 450 < training["GFLOP a sample"] < 600
    assert denoising["kernels"] < training["kernels"]


def test_what_a_gpu_is_tried_with_runs_on_a_cpu(capsys: Capture) -> None:
    gpu.main(["--short"])
    found = json.loads(Path("runs/bench/gpu.json").read_text())
    assert found["the same images as on the CPU"]["4 steps, fp32"]["difference"] < 1e-4
    assert {title for title in found["training, by batch and execution"] if "memory" in title}
    assert "one step of every recipe" in capsys.readouterr().out


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
