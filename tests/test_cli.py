"""The public command, from images to scores, on tiny networks; and what it says when something is wrong."""

import contextlib
import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file

from featinv_pl.__main__ import main
from featinv_pl.tasks.extraction import FeatureExtraction
from featinv_pl.tasks.pretraining import Classifier
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


@pytest.mark.parametrize("command", [["--help"], ["fit", "--help"], ["verify", "--help"], []])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main(command)
    assert "usage: " in capsys.readouterr().out


def test_who_has_no_home_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # as in a container
    refused(["--version"], capsys, "HOME: user 2147483641 has no home folder. Set HOME")


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
    ("override", "fragment"),
    [
        ("--data=DigitsData", "reads feature shards, and DigitsData"),
        ("--data.batch_size=100000", "--data.batch_size: 100000 is more than the 60 training samples"),
        ("--model.prior=nowhere", "--model.prior: 'nowhere' is neither a folder nor a file"),
        ("--model.backbone=resnett50", "'resnett50' is neither a folder nor a timm model. Did you mean resnet50"),
        ("--model.sampler.steps=0", "--model.sampler.steps cannot be 0"),
        (
            "--model.dropuot=0.1",
            "has no option --model.dropuot. Did you mean --model.objective.dropout?",
        ),
        ("--model.objective.dropout=lots", "error: --model.objective.dropout: 'lots' is not a number."),
        (
            "--model.sampler.scheduler=euler",
            "--model.sampler.scheduler: 'euler' is not one of ddim, dpm, unipc.",
        ),
        ("--model=FeatureInversoin", "there is no class 'FeatureInversoin'. Did you mean FeatureInversion?"),
        ("--model.optimizer=torch.optim.AdamWW", "--model.optimizer: there is no class 'AdamWW'. Did you mean AdamW?"),
        ("--trainer.callbacks+=MovingAvrage", "there is no class 'MovingAvrage'. Did you mean MovingAverage?"),
        ("--trainer.max_stps=2", "error: there is no option --trainer.max_stps. Did you mean --trainer.max_steps?"),
        ("--batch_size=2", "error: there is no option --batch_size. Did you mean --data.batch_size?"),
        ("--data.test=3", "error: --data.test: '3' is not a mapping."),
        ("--trainer.devices=many", "error: --trainer: "),
        ("inversion.yaml", "unexpected argument 'inversion.yaml'. Give a file by --config inversion.yaml."),
        ("--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.lr_scheduler: ReduceLROnPlateau"),
        ("--ckpt_path=nowhere.ckpt", "--ckpt_path: there is no file 'nowhere.ckpt'"),
        ("--trainer.default_root_dir=inversion.yaml", "'inversion.yaml' cannot be a folder (File exists)"),
        ("--trainer.default_root_dir=s3://b/run", "--trainer.default_root_dir: 's3://b/run' is an address"),
        ("--trainer.gradient_clip_algorithm=foo", "--trainer: --trainer.gradient_clip_algorithm foo is invalid"),
        ("--trainer.overfit_batches=2", "--trainer.overfit_batches: each epoch takes other batches"),
    ],
)
def test_bad_options_are_refused(
    override: str,
    fragment: str,
    shards: Path,
    classifier_folder: Path,
    prior_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    refused(["fit", "--config", config, override], capsys, fragment)


def test_unknown_command_and_missing_yaml_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["train"], capsys, "no command 'train'")
    refused(["fit", "--config", "nowhere.yaml"], capsys, "--config: there is no file 'nowhere.yaml'.")
    refused(["fit", "--model=Classifier"], capsys, "--model: Classifier also needs --model.model, --model.num_classes")
    refused(["fit", "--trainer.max_steps=2"], capsys, "missing: --model. Give a configuration (--config FILE)")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("trainer\n  max_steps: 3\n", "--config: 'sub/a.yaml', line 2, is not YAML: "),
        ("modle: 3\n", "there is no option --modle ('sub/a.yaml', line 1). Did you mean --model?"),
        ("trainer: {max_steps: many}\n", "--trainer.max_steps: 'many' is not an integer ('sub/a.yaml', line 1)."),
        ("model:\n  init_args:\n    dropuot: 3\n", "--model.dropuot ('sub/a.yaml', line 3). Did you mean"),
        ("trainer:\n  callbacks:\n  - class_path: ModelCheckpont\n", "'ModelCheckpont' ('sub/a.yaml', line 3)"),
        ("base: b.yaml\n", "base: 'sub/b.yaml', line 2, is not YAML"),
        ("- 3\n", "--config: 'sub/a.yaml' holds no options"),
        ("data: {init_args: {train: inner}}\n", "relative to the working directory, so give 'sub/inner'."),
    ],
)
def test_mistakes_in_files_are_told_with_file_and_line(
    text: str, fragment: str, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sub/inner").mkdir(parents=True)
    Path("sub/a.yaml").write_text(text)
    Path("sub/b.yaml").write_text("a: [")
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder))
    refused(["fit", "--config", config, "--config", "sub/a.yaml"], capsys, fragment)


def test_a_training_ends_with_its_results_and_what_follows(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(Path("inversion.yaml"), inversion(classifier_folder, prior_folder, shards))
    main(["fit", "--config", config, "--trainer.fast_dev_run=true"])
    assert "Results" not in capsys.readouterr().out
    main(["fit", "--config", config])
    results = "Results: run (checkpoint run/inversion.ckpt)\n"
    follows = "Next: featinv-pl test --config run/fit.yaml --ckpt_path run/inversion.ckpt\n"
    assert capsys.readouterr().out.endswith(results + follows)
    main(["fit", "--config", config, "--ckpt_path=last"])  # finished before
    shown = capsys.readouterr().err
    assert " 2/2 " in shown
    assert "/3 " not in shown
    epochs = [*["fit", "--config", config], "--trainer.max_epochs=1", "--trainer.max_steps=-1"]
    epochs += ["--trainer.val_check_interval=1.0", "--trainer.default_root_dir=epochs"]
    totals = []
    for resumed in ([], ["--ckpt_path=last"]):
        main([*epochs, *resumed])
        totals.append(set(re.findall(r" \d+/(\d+) ", capsys.readouterr().err)))
    assert totals[0] == totals[1]


def test_shards_of_another_backbone_are_refused(
    shards: Path, classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


class Recorder(Callback):
    """Notes whether Lightning keeps all predictions in memory."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path("kept").write_text(str(trainer.predict_loop.return_predictions))


def test_an_extraction_repeats_byte_for_byte_and_leaves_nothing_in_memory(
    shards: Path, classifier_folder: Path, prior_folder: Path
) -> None:
    settings = extraction(classifier_folder, prior_folder, ["val"])
    settings["trainer"]["callbacks"].append({"class_path": f"{__name__}.Recorder"})
    main(["predict", "--config", write(Path("extract.yaml"), settings)])
    assert Path("kept").read_text() == "False"
    for path in Path("shards/val").iterdir():
        assert path.read_bytes() == (shards / "val" / path.name).read_bytes()
    gc.collect()
    assert not any(isinstance(one, FeatureExtraction) for one in gc.get_objects())


def test_the_command_is_a_process() -> None:
    """One that needs no torch for its own help, and whose reader may end."""
    code = "import sys; from featinv_pl.__main__ import main; main(['--version']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "featinv_pl"]
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, check=False, text=True)
    os.close(written)
    assert (done.returncode, done.stderr) == (141, "")
