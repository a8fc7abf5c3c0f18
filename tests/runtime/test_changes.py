"""Settings that change between two parts of a training."""

import contextlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from featinv_pl.__main__ import main
from interrupts import Capture, assert_same, checkpoint, stopped
from test_cli import files
from tiny import short, write

NO_VALIDATION = "--trainer.limit_val_batches=0"
ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
CYCLE = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.01, "total_steps": 5}}


class Rates(Callback):
    """Notes what each step is made with."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        with Path("rates").open("a") as file:
            file.write(rate(trainer.global_step, optimizer))


def rate(step: int, optimizer: Any) -> str:
    group = optimizer.param_groups[0]
    return f"{step} {group['lr']} {group['weight_decay']} {group['betas']}\n"


def option(name: str, value: Any) -> str:
    return f"--model.{name}={yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}"


def with_args(spec: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return {**spec, "init_args": {**spec["init_args"], **arguments}}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, shards: Path, classifier_folder: Path, prior_folder: Path) -> Path:
    """Two trainings of two steps: with a schedule in `run-cycle`, without in `run`."""
    folder = tmp_path_factory.mktemp("changes")
    with contextlib.chdir(folder):
        config = write(folder / "fit.yaml", short(classifier_folder, prior_folder, shards))
        args = ["fit", "--config", config, NO_VALIDATION, "--trainer.max_steps=2", option("optimizer", ADAM)]
        main(args)
        main([*args, option("lr_scheduler", CYCLE), "--trainer.default_root_dir=run-cycle"])
    return folder


def made(spec: dict[str, Any], *args: Any) -> Any:
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(*args, **spec["init_args"])


def from_the_beginning(adam: dict[str, Any], schedule: dict[str, Any] | None, steps: int) -> list[str]:
    optimizer = made(adam, [torch.nn.Parameter(torch.zeros(1))])
    scheduler, found = made(schedule, optimizer) if schedule else None, []
    for step in range(steps):
        found.append(rate(step, optimizer))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "optimizer", "new_schedule", "said"),
    [
        (None, with_args(ADAM, lr=0.001), None, "lr: 0.01 in the checkpoint, 0.001 here"),
        (CYCLE, with_args(ADAM, lr=0.001), CYCLE, "lr: 0.01 in the checkpoint, 0.001 here, which the schedule does"),
        (CYCLE, ADAM, with_args(CYCLE, max_lr=0.001), "max_lr: 0.01 in the checkpoint, 0.001 here"),
        (CYCLE, ADAM, None, "lr_scheduler: OneCycleLR in the checkpoint, none here"),
        (None, ADAM, CYCLE, "lr_scheduler: none in the checkpoint, OneCycleLR here"),
        (CYCLE, ADAM, CYCLE, None),
    ],
)
def test_changed_rates_hold(
    schedule: Any, optimizer: Any, new_schedule: Any, said: str | None, old: Path, fit: list[str], capsys: Capture
) -> None:
    """Each step is made with what a training with the new settings from its beginning makes it with."""
    new = [option("optimizer", optimizer), option("lr_scheduler", new_schedule), "--trainer.max_steps=4"]
    before = old / ("run-cycle" if schedule else "run") / "inversion.ckpt"
    main([*fit, NO_VALIDATION, *new, f"--ckpt_path={before}", f"--trainer.callbacks+={__name__}.Rates"])
    assert Path("rates").read_text() == "".join(from_the_beginning(optimizer, new_schedule, 4)[2:])
    error = capsys.readouterr().err
    assert f"from step 2 on, settings are other than before ({said}" in error if said else "other than" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed_everything=1", "a training keeps its seed (--seed_everything: 0 in the checkpoint, 1 here)"),
        (option("optimizer", {"class_path": "torch.optim.SGD"}), "--model.optimizer: AdamW in the checkpoint, SGD"),
        (option("optimizer", with_args(ADAM, amsgrad=True)), "its amsgrad (--model.optimizer: False in the checkpoint"),
        (option("lr_scheduler", with_args(CYCLE, total_steps=1)), "of step 2, and --model.lr_scheduler ends before"),
        ("--trainer.max_steps=1", "has come to step 2, and --trainer.max_steps is 1"),
    ],
)
def test_another_training_is_refused(options: str, message: str, old: Path, fit: list[str], capsys: Capture) -> None:
    before, args = files(old), [*fit, option("optimizer", ADAM), f"--trainer.default_root_dir={old}/run"]
    assert message in stopped([*args, options, "--ckpt_path=last"], capsys)[1]
    assert files(old) == before


def test_a_moving_average_comes_and_goes(settings: dict[str, Any], capsys: Capture) -> None:
    average = settings["trainer"]["callbacks"].pop(0)
    args = ["fit", NO_VALIDATION, "--config", write(Path("without.yaml"), settings)]
    main([*args, "--trainer.default_root_dir=complete", "--trainer.max_steps=3"])
    settings["trainer"]["callbacks"].insert(0, average)
    main([*args[:-1], write(Path("with.yaml"), settings), "--trainer.max_steps=2"])
    main([*args, "--ckpt_path=last", "--trainer.max_steps=3"])
    assert "moving average: 0.5 in the checkpoint, none here" in capsys.readouterr().err
    assert "current_model_state" not in checkpoint()
    assert_same(checkpoint()["state_dict"], checkpoint("complete/inversion.ckpt")["state_dict"])
    main([*args[:-1], "with.yaml", "--ckpt_path=last", "--trainer.max_steps=4"])
    assert "moving average: none in the checkpoint, 0.5 here" in capsys.readouterr().err
    assert "current_model_state" in checkpoint()


def test_changed_patience_holds(settings: dict[str, Any], capsys: Capture) -> None:
    stopping = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "mode": "max", "patience": 9}}
    settings["trainer"] |= {"callbacks": [*settings["trainer"]["callbacks"], stopping], "limit_val_batches": 1}
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    main([*args, "--trainer.max_steps=2"])
    main([*args, "--ckpt_path=last", "--trainer.callbacks.patience=4", "--trainer.max_steps=3"])
    assert "patience: 9 in the checkpoint, 4 here" in capsys.readouterr().err
    [state] = [value for name, value in checkpoint()["callbacks"].items() if name.startswith("EarlyStopping")]
    assert state["patience"] == 4
