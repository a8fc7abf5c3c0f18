"""The public command, from images to scores, on tiny networks; and what it says when something is wrong."""

import contextlib
import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from featinv_pl.__main__ import main
from featinv_pl.data.shards.manifest import read_manifest, write_manifest
from tiny import extraction, inversion, write


def test_short_names_overrides_and_print_config(
    capsys: pytest.CaptureFixture[str], classifier_folder: Path, prior_folder: Path
) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", config, "--model.objective.dropout=0.5", "--data.test.hard=here", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["objective"]["dropout"] == 0.5
    assert printed["data"]["init_args"]["test"]["hard"] == "here"


def test_base_lies_beneath(capsys: pytest.CaptureFixture[str]) -> None:
    Path("below").mkdir()
    write(
        Path("root.yaml"),
        {"trainer": {"max_steps": 1, "precision": 32, "callbacks": [{"class_path": "MovingAverage"}]}},
    )
    write(Path("below/middle.yaml"), {"base": "../root.yaml", "trainer": {"max_steps": 2}})
    top = {"base": "below/middle.yaml", "trainer": {"callbacks+": [{"class_path": "Evaluation"}]}}
    config = write(Path("top.yaml"), {**top, "model": {"class_path": "Classifier", "init_args": CLASSIFIER}})
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (trainer["max_steps"], trainer["precision"]) == (2, 32)
    names = [callback["class_path"].split(".")[-1] for callback in trainer["callbacks"]]
    assert names == ["MovingAverage", "Evaluation"]


CLASSIFIER: dict[str, Any] = {"model": "test_resnet", "num_classes": 10, "image_size": 32}


@pytest.mark.parametrize("command", [["--help"], ["fit", "--help"], ["verify", "--help"], []])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(command)
    assert "usage: " in capsys.readouterr().out


def test_version_needs_no_torch() -> None:
    code = "import sys; from featinv_pl.__main__ import main; main(['--version']); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", result.stdout)


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, written = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-m", "featinv_pl"], stdout=written, stderr=subprocess.PIPE, check=False)
    os.close(written)
    assert (result.returncode, result.stderr) == (141, b"")


def test_who_has_no_home_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # as in a container
    refused(["--version"], capsys, "HOME: user 2147483641 has no entry in passwd", "Set HOME")


def test_a_path_may_have_several_lines_but_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["report", "a\nb"], capsys, r"below 'a\nb', that is")


# Bad input: one message, a failing exit status, and nothing that was there is harmed.


def refused(args: list[str], capsys: pytest.CaptureFixture[str], *fragments: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    error = capsys.readouterr().err
    assert stop.value.code not in (0, None)
    for fragment in fragments:
        assert fragment in error
    assert "Traceback" not in error
    assert not Path("run").exists() or not list(Path("run").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("--data.train=nowhere", ["--data.train: there is no folder 'nowhere'"]),
        ("--data.test.clean=nowhere", ["--data.test.clean: there is no folder 'nowhere'"]),
        (
            "--model.prior=nowhere",
            ["--model.prior: 'nowhere' is neither a folder nor a file"],
        ),
        ("--model.backbone=resnett50", ["'resnett50' is neither a folder nor a timm model", "Did you mean resnet50"]),
        ("--ckpt_path=nowhere.ckpt", ["--ckpt_path: there is no file 'nowhere.ckpt'"]),
        ("--model.dropuot=0.1", ["dropuot"]),
        ("--model.objective.dropout=lots", ["dropout"]),
        ("--data.batch_size=100000", ["--data.batch_size: a batch of 100000"]),
        ("--model.sampler.steps=0", ["--model.sampler.steps cannot be 0"]),
        (
            "--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau",
            ["--model.lr_scheduler: ReduceLROnPlateau waits for a metric"],
        ),
        ("--trainer.default_root_dir=inversion.yaml", ["'inversion.yaml' cannot be a folder (File exists)"]),
        ("--trainer.default_root_dir=s3://bucket/run", ["--trainer.default_root_dir: 's3://bucket/run' is an address"]),
        (
            "--trainer.gradient_clip_algorithm=foo",
            ["--trainer: --trainer.gradient_clip_algorithm foo is invalid"],
        ),
    ],
)
def test_bad_options_are_refused(
    override: str,
    fragments: list[str],
    shards: Path,
    classifier_folder: Path,
    prior_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    refused(["fit", "--config", config, override], capsys, *fragments)


def test_images_in_place_of_shards_are_refused(
    classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**inversion(classifier_folder, prior_folder), "data": {"class_path": "DigitsData"}}
    refused(["fit", "--config", write(Path("images.yaml"), settings)], capsys, "reads feature shards, and DigitsData")


def test_typo_in_a_yaml_is_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = inversion(classifier_folder, prior_folder, shards)
    settings["model"]["init_args"]["hiden_channels"] = 3
    refused(["fit", "--config", write(Path("typo.yaml"), settings)], capsys, "hiden_channels")


def test_unknown_command_and_missing_yaml_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["train"], capsys, "no command 'train'")
    refused(["fit", "--config", "nowhere.yaml"], capsys, "nowhere.yaml")
    write(Path("top.yaml"), {"base": "nowhere.yaml"})
    refused(["fit", "--config", "top.yaml"], capsys, "error: base: there is no file")


def test_shards_of_another_backbone_are_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from featinv_pl.tasks.pretraining import Classifier

    torch.manual_seed(9)
    Classifier("test_resnet", 10, 32, {"output_stride": 8, "channels": [8, 8, 8, 8]}).save_pretrained(Path("other"))
    Classifier("test_resnet", 10, 32, {"output_stride": 16, "channels": [8, 8, 8, 16]}).save_pretrained(Path("wide"))
    for name, shape in (("other", "(8, 4, 4)"), ("wide", "(16, 2, 2)")):
        config = write(Path("inversion.yaml"), inversion(Path(name), prior_folder, shards))
        fragments = ("model.backbone: the shard set", str(classifier_folder), f"this model of '{name}'", shape)
        refused(["fit", "--config", config], capsys, *fragments)


def test_shards_of_another_autoencoder_are_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(prior_folder, "prior")
    weights = Path("prior/vae/diffusion_pytorch_model.safetensors")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    config = write(Path("inversion.yaml"), inversion(classifier_folder, Path("prior"), shards))
    refused(["fit", "--config", config], capsys, "model.prior: the shard set")


def test_checkpoint_of_another_model_is_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    main(["fit", "--config", config])
    shutil.move("run", "before")
    before = Path("before/inversion.ckpt").read_bytes()
    args = ["fit", "--config", config, "--ckpt_path", "before/inversion.ckpt"]
    refused([*args, "--model.conditioning=pooled"], capsys, "conditioning: spatial there, pooled here")
    refused([*args, "--model.encoder.hidden_channels=4"], capsys, "hidden_channels: 8 there, 4 here")
    foreign = {"state_dict": {"weight": torch.ones(1)}, "global_step": 1, "pytorch-lightning_version": "2.6.6"}
    torch.save(foreign, "foreign.ckpt")
    refused([*args[:-1], "foreign.ckpt"], capsys, "not one of a FeatureInversion")
    Path("damaged.ckpt").write_bytes(before[: len(before) // 2])
    refused([*args[:-1], "damaged.ckpt"], capsys, "damaged.ckpt")
    assert Path("before/inversion.ckpt").read_bytes() == before


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_finished_shards_are_never_overwritten(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shards, "shards")
    before = files(Path("shards/val"))
    config = write(Path("extract.yaml"), extraction(classifier_folder, prior_folder, ["val"]))
    main(["predict", "--config", config])
    assert "already holds the finished shard set" in capsys.readouterr().err
    refused(["predict", "--config", config, "--data.batch_size=15"], capsys, "batch_size: 30 there, 15 here")
    assert files(Path("shards/val")) == before


def test_map_of_the_wrong_shape_is_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shards, "shards")
    manifest = read_manifest(Path("shards/train"), "")
    manifest["provenance"]["feature_shape"] = [8, 5, 5]
    write_manifest(Path("shards/train"), manifest)
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder))
    refused(["fit", "--config", config], capsys, "maps of (8, 5, 5)", "maps of (8, 4, 4)")


def test_extraction_repeats_byte_for_byte(shards: Path, classifier_folder: Path, prior_folder: Path) -> None:
    main(["predict", "--config", write(Path("e.yaml"), extraction(classifier_folder, prior_folder, ["val"]))])
    for path in Path("shards/val").iterdir():
        assert path.read_bytes() == (shards / "val" / path.name).read_bytes()


class Recorder(Callback):
    """Notes whether Lightning keeps all predictions in memory."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path("kept").write_text(str(trainer.predict_loop.return_predictions))


def test_extraction_does_not_keep_its_predictions(classifier_folder: Path, prior_folder: Path) -> None:
    settings = extraction(classifier_folder, prior_folder, ["val"])
    settings["trainer"]["callbacks"].append({"class_path": f"{__name__}.Recorder"})
    main(["predict", "--config", write(Path("extract.yaml"), settings)])
    assert Path("kept").read_text() == "False"


def test_a_run_leaves_no_model_behind(classifier_folder: Path, prior_folder: Path) -> None:
    def trainers() -> int:
        gc.collect()
        return sum(isinstance(one, Trainer) for one in gc.get_objects())

    before = trainers()
    main(["predict", "--config", write(Path("extract.yaml"), extraction(classifier_folder, prior_folder, ["val"]))])
    assert trainers() == before


def test_every_command_runs_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "featinv_pl", "demo"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "featinv-pl: error: `make demo` runs the demo, in the folder of the repository.\n"
