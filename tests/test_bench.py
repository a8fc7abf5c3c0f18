"""The benchmark measures, on tiny networks, what it will measure at full size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import counted, gpu, loops, machine, samplers, training
from bench.__main__ import main, tiny_options
from bench.training import AGAIN, SAVINGS
from featinv_pl.sampling.sampler import Sampler
from interrupts import Capture

TINY_BLOCKS = {
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
KERNELS, TRAFFIC = 2000, 2.2  # GB a sample


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
    small = {"block_out_channels": [32, 32], "cross_attention_dim": counted.WIDTH, **TINY_BLOCKS}
    monkeypatch.setattr(counted, "UNET", {"sample_size": 32, **small})
    _, logs_nothing, *_ = counted.training_steps(counted.full_size(tmp_path), 2)[1:]
    assert logs_nothing.kernels.total() > 200
    assert not logs_nothing.synchronisations
    assert not logs_nothing.collectives
    loop = counted.sampling_loop(counted.full_size(tmp_path), 2, Sampler(steps=3))
    assert loop.kernels.total() > 100
    assert not loop.synchronisations.total()


def test_fewer_computations_are_scored(
    inverter_folder: Path, classifier_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    names = ("dpm 8, guidance_every 2, control_every 2", "dpm 3")
    monkeypatch.setattr(samplers, "SAMPLERS", {name: samplers.SAMPLERS[name] for name in names})
    monkeypatch.setattr(samplers, "full_size", lambda: (0.1, 1.0, 10.0))  # of the encoder, the control and the UNet
    samplers.main(["--models", str(inverter_folder), "--judge", str(classifier_folder), "--images", "3"])
    *_, fewer, plain, authors = capsys.readouterr().out.splitlines()
    figures = [[float(one) for one in row.split(" | ")[2:-1]] for row in (fewer, plain)]
    # Eight steps, half of them with one branch; the control at every second, of both branches. Three steps with both.
    assert [row[0] for row in figures] == [0.2 + 8 + 120, 0.2 + 6 + 60]
    assert all(0 <= row[3] <= 1 and -1 <= row[1] <= 1 for row in figures)
    assert authors.startswith("authors: ")


def test_both_loops_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(loops, "TINY", {"block_out_channels": [32, 32], **TINY_BLOCKS})
    main(["--parts", "loops", "--short"])
    found = json.loads(Path("runs/bench/bench.json").read_text())["loops"]
    assert {"diffusers", "ours", "ratio"} == set().union(*found.values())
    assert all(min(row.values()) > 0 for row in found.values())


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
