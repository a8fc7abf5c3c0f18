"""The benchmark measures, on tiny networks, what it will measure at full size."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import machine, training
from bench.__main__ import main, tiny_options
from bench.memory import Live, autocast
from bench.training import AGAIN, SAVINGS
from configurations import effective_config


@pytest.fixture
def tiny(classifier_folder: Path, prior_folder: Path) -> list[str]:
    return tiny_options(classifier_folder, prior_folder)


def bench(*args: str) -> dict[str, Any]:
    main(args)
    found: dict[str, Any] = json.loads(Path("runs/bench/bench.json").read_text())
    return found


@pytest.mark.parametrize("names", [["bf16", "again"], pytest.param([*SAVINGS, "again"], marks=pytest.mark.slow)])
def test_every_saving_and_every_way_has_its_figures(
    names: list[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "NAMES", {name: {**SAVINGS, **AGAIN}[name] for name in names})
    recipes = {title: recipe for title, recipe in training.RECIPES.items() if recipe[0] in names}
    monkeypatch.setattr(training, "RECIPES", recipes)
    monkeypatch.setattr(machine, "product_rates", lambda: {"float32": 1e9, "bfloat16": 1e9})
    options = [f"--option={option}" for option in tiny]
    found = bench("--parts", "training", "sampling", "--rounds", "1", "--steps", "2", "--long", "3", "2", *options)
    configurations = {one["name"]: one for one in found["training"]["configurations"]}
    assert [*configurations] == names
    flops = [configurations[name]["flops"] for name in names]
    assert flops[-1] > flops[-2]
    if "fused" in names:
        authors, cached, frozen, kept, fused, bf16, _ = flops
        assert authors > cached > frozen > kept == fused == bf16
        assert configurations["bf16"]["state"] < configurations["fused"]["state"]
    assert all(one["rate"] > 0 and one["peak"] > 0 and len(one["seconds"]) == 2 for one in configurations.values())
    samples = list(found["training"]["memory"].values())[: -len(recipes)]
    assert samples == sorted(samples)  # recomputed, in half precision, in full
    assert len(samples) == len({name for name, _ in recipes.values()})
    ways = found["sampling"]["ratios"]
    assert next(iter(ways)) == "as the authors sample, branch by branch"
    printed = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in printed
    rows = [row.split(" | ") for row in printed.splitlines() if row.count(" | ") == 4]
    differences = [float(row[3]) for row in rows if row[3][0].isdigit()]
    assert len(differences) == len(ways)
    assert max(differences[:3]) < 1e-5  # what is saved changes nothing
    assert 1e-5 < differences[3] < 0.1


def test_norms_on_a_gpu_hold_fp32() -> None:
    with FakeTensorMode(), torch.device("cuda"), Live() as live:
        convolution, norm, images = torch.nn.Conv2d(8, 8, 1), torch.nn.GroupNorm(4, 8), torch.randn(2, 8, 16, 16)
        before = live.bytes
        with autocast():
            output = norm(convolution(images))
    values = images.numel()
    copies = 2 * values + 2 * 64  # of the convolution's input and weight, in bf16
    assert live.bytes - before == copies + 4 * values + 4 * values + 2 * 4 * 2 * 4  # input, output, mean and deviation
    assert output.dtype == torch.float32


def test_digits_are_profiled_and_compared(tiny: list[str]) -> None:
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0}
    optimizer = {"class_path": "FeatureInversion", "init_args": {"optimizer": {"class_path": "torch.optim.AdamW"}}}
    data = {"class_path": "bench.data.RandomData", "init_args": {"batch_size": 2}}
    Path("base.yaml").write_text(yaml.safe_dump({"trainer": trainer, "model": optimizer, "data": data}))
    Path("tiny.yaml").write_text(yaml.safe_dump(effective_config(["fit", "--config=base.yaml", *tiny])))
    found = bench("--parts", "digits", "--digits_config", "tiny.yaml", "--digits_steps", "6", "--rounds", "1")["digits"]
    assert 0.3 < found["share"] < 1
    plain, fast = found["losses"].values()
    assert len(plain[0]) == len(fast[0]) == 6
    assert 0 < found["difference"] < 0.1 * found["plain"]
    assert Path("runs/bench/losses.png").is_file()


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
