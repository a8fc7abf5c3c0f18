"""Runs do not touch each other: one folder each, for one process and one training."""
# ruff: noqa: F811 (fixtures are imported, and are arguments too)

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from featinv_pl.__main__ import main
from featinv_pl.runtime.run_folder import claim
from test_cli import files, refused
from test_reliability import settings, trained_on  # noqa: F401 (fixtures)
from tiny import extraction, write

ROOT = Path(__file__).parents[1]


def checkpoint(path: str = "run/inversion.ckpt") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


# One folder


def test_a_run_lies_below_its_folder_alone(settings: dict[str, Any]) -> None:
    settings["trainer"]["logger"] = {"class_path": "WandbLogger", "init_args": {"project": "featinv-pl"}}
    args = ["fit", "--config", write(Path("fit.yaml"), settings), "--trainer.max_steps=1"]
    before = set(Path().iterdir())
    main([*args, "--trainer.default_root_dir=one"])
    assert set(Path().iterdir()) - before == {Path("one")}
    assert sorted(path.name for path in Path("one").iterdir()) == ["fit.yaml", "inversion.ckpt", "wandb"]
    # What it has saved of itself does not lead another run there.
    first = files(Path("one"))
    main(["fit", "--config", "one/fit.yaml", "--trainer.default_root_dir=two"])
    assert sorted(path.name for path in Path("two").iterdir()) == ["fit.yaml", "inversion.ckpt", "wandb"]
    assert files(Path("one")) == first


def test_a_folder_with_a_checkpoint_is_refused(
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    main([*args, "--trainer.max_steps=2"])
    before = files(Path("run"))
    Path("other").mkdir()
    Path("other/inversion.ckpt").write_bytes(Path("run/inversion.ckpt").read_bytes())
    for options in ([], ["--ckpt_path=other/inversion.ckpt"]):  # nor may one that continues another training
        with pytest.raises(SystemExit):
            main([*args, *options])
        error = capsys.readouterr().err
        assert "'run/inversion.ckpt' is the checkpoint of an earlier training" in error
        assert "--ckpt_path last" in error
        assert files(Path("run")) == before
    main([*args, "--ckpt_path=last"])
    assert checkpoint()["global_step"] == 5


def test_a_folder_in_use_is_refused(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    code = "import sys; from pathlib import Path; from featinv_pl.runtime.run_folder import claim\n"
    code += "with claim(Path('run')):\n  print('claimed', flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for command in (args, ["test", *args[1:]]):
            refused(command, capsys, f"'run' is in use: process {other.pid} is writing there")
        assert sorted(os.listdir("run")) == [".featinv-pl.lock"]
        other.kill()
    main([*args, "--trainer.max_steps=1"])  # a lock does not outlive its process
    assert sorted(os.listdir("run")) == ["fit.yaml", "inversion.ckpt"]


def test_a_claim_is_not_inherited_and_leaves_nothing() -> None:
    with claim(Path("run")):
        if (child := os.fork()) == 0:
            try:
                with claim(Path("run")):
                    os._exit(1)
            except ValueError:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert not Path("run").exists()


def test_extractions_share_a_folder_but_no_set(
    classifier_folder: Path, prior_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def args(*sources: str) -> list[str]:
        return ["predict", "--config", write(Path("e.yaml"), extraction(classifier_folder, prior_folder, [*sources]))]

    child = os.fork()
    if child == 0:
        with claim(Path("shards/val")):
            Path("claimed").touch()
            while Path("claimed").exists():
                pass
        os._exit(0)
    while not Path("claimed").exists():
        pass
    refused(args("train", "val"), capsys, f"'shards/val' is in use: process {child} is writing there")
    main(args("clean"))
    Path("claimed").unlink()
    os.waitpid(child, 0)
    main(args("train", "val"))
    for source in ("train", "val", "clean"):  # how each was made is not what the last one was made by
        assert source in yaml.safe_load(Path(f"shards/{source}.yaml").read_text())["data"]["init_args"]["sources"]
        assert not Path(f"shards/{source}/.featinv-pl.lock").exists()


# Continuing


def test_what_is_saved_of_a_run_continues_none(settings: dict[str, Any]) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    main([*args, "--trainer.max_steps=2"])
    main([*args, "--ckpt_path=last"])
    main(["validate", *args[1:], "--ckpt_path=last"])
    for name in ("fit", "validate"):
        assert "ckpt_path" not in yaml.safe_load(Path(f"run/{name}.yaml").read_text())
    main(["fit", "--config", "run/fit.yaml", "--trainer.default_root_dir=new", "--seed_everything=1"])
    one, other = (checkpoint(f"{folder}/inversion.ckpt") for folder in ("run", "new"))
    assert other["global_step"] == 5
    assert not all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])


ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
CYCLE = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.01, "total_steps": 5}}


class Rates(Callback):
    """Notes what each step is made with."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        with Path("rates").open("a") as file:
            file.write(f"{trainer.global_step} {group['lr']} {group['weight_decay']} {group.get('betas')}\n")


def rates(args: list[str]) -> list[str]:
    Path("rates").unlink(missing_ok=True)
    main([*args, f"--trainer.callbacks+={__name__}.Rates"])
    return Path("rates").read_text().splitlines()


def option(name: str, value: Any) -> str:
    return f"--model.{name}={yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}"


def with_args(spec: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return {**spec, "init_args": {**spec["init_args"], **arguments}}


@pytest.mark.parametrize(
    ("schedule", "optimizer", "new_schedule", "said"),
    [
        (None, with_args(ADAM, lr=0.001), None, "lr: 0.01 in the checkpoint, 0.001 here"),
        (None, with_args(ADAM, weight_decay=0.5), None, "weight_decay: 0.01 in the checkpoint, 0.5 here"),
        (CYCLE, with_args(ADAM, weight_decay=0.5), CYCLE, "weight_decay: 0.01 in the checkpoint, 0.5 here"),
        (
            CYCLE,
            with_args(ADAM, lr=0.001),
            CYCLE,
            "lr: 0.01 in the checkpoint, 0.001 here, which the schedule does not",
        ),
        (CYCLE, ADAM, with_args(CYCLE, max_lr=0.001), "max_lr: 0.01 in the checkpoint, 0.001 here"),
        (CYCLE, ADAM, with_args(CYCLE, total_steps=8), "total_steps: 5 in the checkpoint, 8 here"),
        (CYCLE, ADAM, with_args(CYCLE, pct_start=0.6), "the schedule"),
        (CYCLE, ADAM, None, "lr_scheduler: OneCycleLR in the checkpoint, none here"),
        (None, ADAM, CYCLE, "lr_scheduler: none in the checkpoint, OneCycleLR here"),
    ],
)
def test_changed_rates_hold_from_the_checkpoint_on(
    schedule: Any,
    optimizer: Any,
    new_schedule: Any,
    said: str,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each step is made with what a training with the new settings from its beginning makes it with."""
    args = ["fit", "--config", write(Path("fit.yaml"), settings), "--trainer.limit_val_batches=0"]
    new = [*args, option("optimizer", optimizer), option("lr_scheduler", new_schedule)]
    expected = rates([*new, "--trainer.default_root_dir=new"])
    main([*args, option("optimizer", ADAM), option("lr_scheduler", schedule), "--trainer.max_steps=2"])
    capsys.readouterr()
    assert rates([*new, "--ckpt_path=last"]) == expected[2:]
    assert f"from step 2 on, settings are other than before ({said}" in capsys.readouterr().err


def test_the_same_settings_are_no_change(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings["model"]["init_args"] |= {"optimizer": ADAM, "lr_scheduler": CYCLE}
    args = ["fit", "--config", write(Path("fit.yaml"), settings), "--trainer.limit_val_batches=0"]
    main([*args, "--trainer.max_steps=2"])
    Path("run").rename("old")
    old = checkpoint("old/inversion.ckpt")
    del old["training"]  # as checkpoints of before
    torch.save(old, "old/inversion.ckpt")
    main([*args, "--ckpt_path=old/inversion.ckpt"])
    assert "settings are other" not in capsys.readouterr().err
    Path("run").rename("from-old")
    main(args)
    one, other = (checkpoint(f"{folder}/inversion.ckpt") for folder in ("run", "from-old"))
    assert one["lr_schedulers"] == other["lr_schedulers"]
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])


def test_a_checkpoint_of_before_shows_its_rates(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    adafactor = {"class_path": "torch.optim.Adafactor", "init_args": {"lr": 0.01}}  # its memory depends on shapes
    args = ["fit", "--config", write(Path("fit.yaml"), settings), "--trainer.limit_val_batches=0"]
    main([*args, option("optimizer", adafactor), "--trainer.max_steps=2"])
    old = checkpoint()
    del old["training"]
    torch.save(old, "run/inversion.ckpt")
    new = rates(
        [*args, "--ckpt_path=last", "--trainer.max_steps=3", option("optimizer", with_args(adafactor, lr=0.001))]
    )
    assert [line.split()[1] for line in new] == ["0.001"]
    assert "from step 2 on, settings are other than before (lr: 0.01 in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed_everything=1"], "a training keeps its seed (--seed_everything: 0 in the checkpoint, 1 here)"),
        ([option("optimizer", {"class_path": "torch.optim.SGD"})], "--model.optimizer: AdamW in the checkpoint, SGD"),
        ([option("optimizer", with_args(ADAM, amsgrad=True))], "remembers exp_avg, exp_avg_sq, max_exp_avg_sq, step"),
        ([option("lr_scheduler", with_args(CYCLE, total_steps=1))], "of step 2, and --model.lr_scheduler ends before"),
        (["--trainer.max_steps=1"], "has come to step 2, and --trainer.max_steps is 1"),
    ],
)
def test_what_would_make_another_training_of_it_is_refused(
    options: list[str],
    message: str,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["fit", "--config", write(Path("fit.yaml"), settings), option("optimizer", ADAM)]
    main([*args, "--trainer.max_steps=2", "--trainer.limit_val_batches=0"])
    before = files(Path("run"))
    with pytest.raises(SystemExit):
        main([*args, *options, "--ckpt_path=last"])
    assert message in capsys.readouterr().err
    assert files(Path("run")) == before


def test_a_moving_average_comes_and_goes(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    average = settings["trainer"]["callbacks"].pop(0)
    args = ["fit", "--trainer.limit_val_batches=0", "--config", write(Path("without.yaml"), settings)]
    main([*args, "--trainer.default_root_dir=whole", "--trainer.max_steps=3"])
    whole = checkpoint("whole/inversion.ckpt")["state_dict"]
    settings["trainer"]["callbacks"].insert(0, average)
    main([*args[:-1], write(Path("with.yaml"), settings), "--trainer.max_steps=2"])
    main([*args, "--ckpt_path=last", "--trainer.max_steps=3"])
    assert "moving average: 0.5 in the checkpoint, none here" in capsys.readouterr().err
    assert "current_model_state" not in checkpoint()
    assert all(torch.equal(value, whole[name]) for name, value in checkpoint()["state_dict"].items())
    main([*args[:-1], "with.yaml", "--ckpt_path=last"])
    assert "moving average: none in the checkpoint, 0.5 here" in capsys.readouterr().err
    assert "current_model_state" in checkpoint()


def test_changed_patience_holds(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "mode": "max", "patience": 9}}
    settings["trainer"] |= {"callbacks": [*settings["trainer"]["callbacks"], stopping], "limit_val_batches": 2}
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    main([*args, "--trainer.max_steps=2"])
    main([*args, "--ckpt_path=last", "--trainer.callbacks.patience=4"])
    assert "patience: 9 in the checkpoint, 4 here" in capsys.readouterr().err
    [state] = [value for name, value in checkpoint()["callbacks"].items() if name.startswith("EarlyStopping")]
    assert state["patience"] == 4
