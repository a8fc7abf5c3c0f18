"""The table of commands, and the options that it generates."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from conftest import ROOT
from featinv_pl.__main__ import main
from featinv_pl.commands import COMMANDS
from featinv_pl.options import Parser, add_sampler, changed
from featinv_pl.sampling.sampler import AUTHORS, Refinement, Sampler

SAMPLING = ("reconstruct", "steer", "interpolate", "compose", "compare", "audit", "app")
FIELDS = [f"sampler.{field.name}" for field in fields(Sampler) if field.name != "refine"]
FIELDS += [f"sampler.refine.{field.name}" for field in fields(Refinement)]


def test_help_names_every_command_and_needs_no_torch() -> None:
    """Of `featinv-pl` and of each command of ours, in one process."""
    code = """
import contextlib, sys
from featinv_pl.__main__ import run
from featinv_pl.commands import COMMANDS
run(["--help"])
assert "jsonargparse" not in sys.modules
for name, command in COMMANDS.items():
    if command.run:
        with contextlib.suppress(SystemExit):
            run([name, "--help"])
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, command in COMMANDS.items():
        assert f"  {name:11}  {command.does}\n" in done.stdout
        assert command.run is None or f"usage: featinv-pl {name} " in done.stdout
        assert command.run is None or f"example:\n  {command.example}\n" in done.stdout
        assert command.example.startswith(f"featinv-pl {name} ")


def test_reconstructing_imports_no_more_than_it_needs(inverter_folder: Path) -> None:
    """Nearly all its time for a picture goes into imports: of torch, timm and diffusers, and of what these import."""
    words = ["reconstruct", str(ROOT / "docs/digits/4.png"), f"--model={inverter_folder}", "--num_samples=1"]
    code = f"""
import sys
from featinv_pl.__main__ import main
main({[*words, "--out=out"]})
for name in ("lightning", "torchmetrics", "jsonargparse", "webdataset", "sklearn", "matplotlib.figure", "gradio"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Path("out/contact_sheet.png").exists()


@pytest.mark.parametrize("name", SAMPLING)
def test_every_command_that_samples_has_the_options_of_the_sampler(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert not [field for field in FIELDS if f"--{field} " not in printed]
    assert "disables guidance and halves the cost" in " ".join(printed.split())  # as the docstring says


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", AUTHORS),
        ("--sampler.steps 3 --sampler.scheduler unipc", Sampler("unipc", 3, 1.75, "text", spacing="leading")),
        ("--sampler.guidance_interval 0.1 0.8", {"guidance_interval": (0.1, 0.8)}),
        ("--sampler.refine.steps 2 --sampler.refine.target 0.9", {"refine": Refinement(2, target=0.9)}),
        ("--sampler.best_of 4 --sampler.guidance_scale=-1", {"best_of": 4, "guidance_scale": -1.0}),
    ],
)
def test_options_replace_fields_of_the_models_own_sampler(line: str, expected: object) -> None:
    parser = Parser("name", "does", "example")
    add_sampler(parser)
    sampler = changed(AUTHORS, parser.parse_args(line.split()))
    if isinstance(expected, dict):
        assert {name: getattr(sampler, name) for name in expected} == expected
    else:
        assert sampler == expected


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--num_samples", "0"], 2, "error: --num_samples: must be at least 1, and is 0"),
        (["--seed", "x"], 2, "error: --seed: invalid int value"),
        (["--sampler.scheduler", "euler"], 2, "error: --sampler.scheduler: invalid choice"),
        (["--sampler.step", "3"], 2, "error: there is no option --sampler.step. Did you mean --sampler.steps?"),
        (["--sampler.steps", "0"], 1, "--sampler.steps cannot be 0. Give at least 1."),
        (["--sampler.refine.steps", "0"], 1, "--sampler.refine.steps cannot be 0. Give 1 to 1000."),
    ],
)
def test_refuses_values_before_it_loads_a_model(
    options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.png").touch()
    with pytest.raises(SystemExit) as stop:
        main(["reconstruct", "--model", "nowhere", "a.png", "--out", "out", *options])
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert message in error
    assert "usage" not in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("verfy", "there is no command 'verfy'. Did you mean verify?"),
        ("help verfy", "there is no command 'verfy'"),
        ("--config a.yaml fit", "begin with a command: `featinv-pl COMMAND --config`"),
        ("fit", "fit: give a configuration (YAML), such as `featinv-pl fit --config "),
        ("verify", "missing: FOLDER. Example: `featinv-pl verify "),
        ("verify nowhere", "FOLDER: there is no folder 'nowhere'"),
        ("verify folder", "FOLDER: 'folder' holds no feature shards"),
        ("export nowhere out", "RUN: there is no 'nowhere'. Give the folder of a run"),
        (
            "reconstruct folder --model a --out b",
            "IMAGE: 'folder' is a folder. Give its pictures",
        ),
        ("reconstruct a.png --model a --out b", "IMAGE: there is no file 'a.png'"),
        ("reconstruct a.png --model a --oot b", "there is no option --oot. Did you mean --out?"),
    ],
)
def test_a_mistake_is_one_line_of_its_reason(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"featinv-pl: error: {message}")
    assert error.count("\n") == 1


def test_help_and_version_have_their_usual_names(capsys: pytest.CaptureFixture[str]) -> None:
    main(["-V"])
    main(["--version"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    with pytest.raises(SystemExit):
        main(["help", "verify"])
    assert "usage: featinv-pl verify" in capsys.readouterr().out
    main(["help"])
    assert "usage: featinv-pl COMMAND" in capsys.readouterr().out


def test_errors_of_compare_name_its_own_option(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (32, 32)).save("a.png")
    Path("folder").mkdir()
    with pytest.raises(SystemExit):
        main(["compare", "a.png", "--models", "folder", "--out", "out"])
    assert "featinv-pl: error: --models: there is no file 'folder/model_index.json'" in capsys.readouterr().err
