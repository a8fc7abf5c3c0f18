"""A trained run becomes a folder that anyone can load."""

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from featinv_pl.__main__ import main
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.frozen import digest
from interrupts import Capture
from test_cli import refused
from tiny import ROOT, write

DIGITS, DEBUG = str(ROOT / "experiments/digits"), str(ROOT / "experiments/debug.yaml")
SAVER = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "run", "filename": "inversion"}}
CALLBACKS = [{"class_path": "Evaluation"}, SAVER]


def configuration(prior: Path, shards: dict[str, Any]) -> list[str]:
    """The experiment on digits, cut short, in the working folder."""
    trainer = {"default_root_dir": "run", "logger": False, "callbacks": CALLBACKS}
    own = write(Path("own.yaml"), {"trainer": trainer, "data": {"init_args": shards}})
    config = ["--config", f"{DIGITS}/spatial.yaml", "--config", DEBUG, "--config", own]
    return [*config, "--model.prior", str(prior), "--model.encoder.hidden_channels=8"]


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory, classifier_folder: Path, prior_folder: Path, digit_shards: Path
) -> Path:
    """A run of `fit` and `test`, as the demo's."""
    home = tmp_path_factory.mktemp("published")
    train, clean = str(digit_shards / "train"), str(digit_shards / "clean")
    with contextlib.chdir(home):
        config = configuration(prior_folder, {"train": train, "val": clean, "test": {"clean": clean}})
        config += ["--model.backbone", str(classifier_folder), "--model.encoder.num_layers=2"]
        main(["fit", *config])
        main(["test", *config, "--ckpt_path", "run/inversion.ckpt"])
    return home / "run"


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    main(["export", str(run), str(folder)])
    return folder


def test_exported_control_is_that_of_the_run(run: Path, exported: Path) -> None:
    pipeline = FeatInvPipeline.from_pretrained(exported)
    state = torch.load(run / "inversion.ckpt", weights_only=True)["state_dict"]
    ours = pipeline.inverter.control.state_dict()
    assert {f"control.{name}" for name in ours} == {name for name in state if not name.startswith("regression.")}
    assert all(torch.equal(value, state[f"control.{name}"]) for name, value in ours.items())
    assert (pipeline.inverter.sampler.steps, pipeline.inverter.image_size) == (10, 32)


def test_folder_is_complete_safe_and_described(run: Path, exported: Path, classifier_folder: Path) -> None:
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    weights = "diffusion_pytorch_model.safetensors"
    parts = {"backbone/model.safetensors", f"prior/unet/{weights}", "prior/prompts.safetensors"}
    assert {f"encoder/{weights}", f"controlnet/{weights}", "model_index.json", "README.md", *parts} <= names
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".md", ""}
    card = (exported / "README.md").read_text()
    index = json.loads((exported / "model_index.json").read_text())
    assert index["backbone"] == "test_resnet"
    for words in ("`test_resnet` at 32 pixels", "a map of 8x4x4", "Steps | 2", "lr 0.005", "| clean |", "0.15"):
        assert words in card
    assert "Weighting of timesteps | velocity" in card
    document = json.loads((run / "metrics.json").read_text())
    scores = document["scores"]["clean"]
    floor, ours, ceiling = (scores[method]["cosine"] for method in ("floor", "inversion", "ceiling"))
    value = f"{ours['value']:.4f} [{ours['low']:.3f}, {ours['high']:.3f}]"
    row = (
        f"| clean | {document['samples']['clean']} | cosine | {floor['value']:.4f} | {value} | {ceiling['value']:.4f} |"
    )
    assert f"{row}\n" in card
    assert card.count(f"`{document['provenance']['checkpoint']['digest'][:16]}`") == 2
    for heading in ("Use", "Training", "Scores", "Limits", "Licence"):
        assert f"\n## {heading}\n" in card
    head: Any = ModelCard(card).data  # as the hub reads it: refused if it is not valid
    assert (head.library_name, head.pipeline_tag, head.license) == ("featinv-pl", "image-to-image", "unknown")
    assert (head.base_model, "feature-inversion" in head.tags) == (None, True)
    [cosine] = [one for one in head.eval_results if (one.dataset_name, one.metric_type) == ("clean", "cosine")]
    assert cosine.metric_value == round(ours["value"], 4)
    assert "* no fid and kid: 'weights-inception" in card
    assert str(classifier_folder) not in card + json.dumps(index)


def test_scores_of_other_weights_are_left_out(run: Path, capsys: Capture) -> None:
    home = Path(shutil.copytree(run, Path("other run").absolute()))
    state = torch.load(home / "inversion.ckpt", weights_only=True)
    next(iter(state["state_dict"].values())).add_(1)
    torch.save({**state, "global_step": 9}, home / "inversion.ckpt")
    main(["export", str(home), "out"])
    assert "Steps | 9" in (card := Path("out/README.md").read_text())
    assert "None were measured with these weights." in card
    [line] = [line for line in capsys.readouterr().err.splitlines() if "no scores" in line]
    assert "other run' has the scores of other weights (step 2, " in line
    [command] = re.findall("`featinv-pl (.*)` and export again", line)
    # The very command is run, but on fewer samples.
    with contextlib.chdir(run.parent):
        main([*shlex.split(command), "--trainer.limit_test_batches=1"])
    main(["export", str(home), "again"])
    scores = json.loads((home / "metrics.json").read_text())["scores"]
    assert f"| {scores['clean']['inversion']['cosine']['value']:.4f} " in Path("again/README.md").read_text()
    assert "no scores" not in capsys.readouterr().err


def test_a_classifier_with_random_weights_is_exported(prior_folder: Path) -> None:
    classifier = ["--model.backbone=test_resnet", "--model.weights=random"]
    extract = ["--config", f"{DIGITS}/extract.yaml", "--config", DEBUG, "--data.sources", "[train]"]
    extract += ["--model.autoencoder", str(prior_folder / "vae"), "--trainer.callbacks.folder=shards"]
    main(["predict", *extract, *classifier, "--trainer.default_root_dir=shards", "--trainer.logger=false"])
    main(["fit", *configuration(prior_folder, {"train": "shards/train", "val": None, "test": {}}), *classifier])
    torch.rand(5)  # a state of its own
    main(["export", "run", "model"])
    exported = FeatInvPipeline.from_pretrained("model").inverter.classifier
    assert digest(exported.model) == torch.load("run/inversion.ckpt", weights_only=True)["inversion"]["backbone"]


def test_export_of_several_checkpoints_wants_one(run: Path, capsys: Capture) -> None:
    home = Path(shutil.copytree(run, "twice"))
    shutil.copy(home / "inversion.ckpt", home / "last.ckpt")
    found = "RUN: 'twice' holds 2 checkpoints: twice/inversion.ckpt, twice/last.ckpt. Give one of"
    refused(["export", "twice", "out"], capsys, found)
    assert not Path("out").exists()
    main(["export", "twice/last.ckpt", "out"])
    assert "Next: featinv-pl reconstruct IMAGE --model out" in capsys.readouterr().out
    refused(["export", "twice/last.ckpt", "out"], capsys, "OUT: 'out' exists, and is left as it is")


ANOTHER_TASK = {"model": {"class_path": "featinv_pl.tasks.pretraining.Classifier", "init_args": {}}}


def remove_an_option(home: Path) -> None:
    settings = yaml.safe_load((home / "fit.yaml").read_text())
    del settings["model"]["init_args"]["image_size"]
    write(home / "fit.yaml", settings)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "RUN: there is no 'broken'"),
        (lambda home: (home / "fit.yaml").unlink(), "RUN: no fit.yaml beside or above 'broken/inversion.ckpt'"),
        (
            lambda home: write(home / "fit.yaml", ANOTHER_TASK),
            "'broken/fit.yaml' does not configure a FeatureInversion",
        ),
        (remove_an_option, "does not configure a FeatureInversion as `fit` saves one (KeyError: 'image_size')"),
    ],
)
def test_refuses_a_run(damage: Any, message: str, run: Path, capsys: Capture) -> None:
    damage(Path(shutil.copytree(run, "broken")))
    refused(["export", "broken", "out"], capsys, message)
    assert not list(Path().glob("out*"))
