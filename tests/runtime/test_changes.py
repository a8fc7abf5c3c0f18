"""Settings that change between two parts of a training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from featinv_pl.__main__ import main
from interrupts import checkpoint, stopped
from test_cli import files
from tiny import write

NO_VALIDATION = "--trainer.limit_val_batches=0"
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
        (CYCLE, with_args(ADAM, weight_decay=0.5), CYCLE, "weight_decay: 0.01 in the checkpoint, 0.5 here"),
        (CYCLE, with_args(ADAM, lr=0.001), CYCLE, "lr: 0.01 in the checkpoint, 0.001 here, which the schedule does"),
        (CYCLE, ADAM, with_args(CYCLE, max_lr=0.001), "max_lr: 0.01 in the checkpoint, 0.001 here"),
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
    fit: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each step is made with what a training with the new settings from its beginning makes it with."""
    args = [*fit, NO_VALIDATION]
    new = [*args, option("optimizer", optimizer), option("lr_scheduler", new_schedule)]
    expected = rates([*new, "--trainer.default_root_dir=new"])
    main([*args, option("optimizer", ADAM), option("lr_scheduler", schedule), "--trainer.max_steps=2"])
    capsys.readouterr()
    assert rates([*new, "--ckpt_path=last"]) == expected[2:]
    assert f"from step 2 on, settings are other than before ({said}" in capsys.readouterr().err


def test_the_same_settings_are_no_change(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings["model"]["init_args"] |= {"optimizer": ADAM, "lr_scheduler": CYCLE}
    args = ["fit", "--config", write(Path("fit.yaml"), settings), NO_VALIDATION]
    main([*args, "--trainer.max_steps=2"])
    Path("run").rename("old")
    old = checkpoint("old/inversion.ckpt")
    del old["settings"]  # as checkpoints of before
    torch.save(old, "old/inversion.ckpt")
    main([*args, "--ckpt_path=old/inversion.ckpt"])
    assert "settings are other" not in capsys.readouterr().err
    Path("run").rename("from-old")
    main(args)
    one, other = (checkpoint(f"{folder}/inversion.ckpt") for folder in ("run", "from-old"))
    assert one["lr_schedulers"] == other["lr_schedulers"]
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])


def test_settings_hold_where_a_checkpoint_of_before_names_none(fit: list[str]) -> None:
    adafactor = {"class_path": "torch.optim.Adafactor", "init_args": {"lr": 0.01}}  # its memory depends on shapes
    args = [*fit, NO_VALIDATION]
    main([*args, option("optimizer", adafactor), "--trainer.max_steps=2"])
    old = checkpoint()
    del old["settings"]
    torch.save(old, "run/inversion.ckpt")
    new = rates(
        [*args, "--ckpt_path=last", "--trainer.max_steps=3", option("optimizer", with_args(adafactor, lr=0.001))]
    )
    assert [line.split()[1] for line in new] == ["0.001"]


REFUSED: list[tuple[list[str], str]] = [
    (["--seed_everything=1"], "a training keeps its seed (--seed_everything: 0 in the checkpoint, 1 here)"),
    ([option("optimizer", {"class_path": "torch.optim.SGD"})], "--model.optimizer: AdamW in the checkpoint, SGD"),
    ([option("optimizer", with_args(ADAM, amsgrad=True))], "keeps exp_avg, exp_avg_sq, max_exp_avg_sq, step"),
    ([option("lr_scheduler", with_args(CYCLE, total_steps=1))], "of step 2, and --model.lr_scheduler ends before"),
    (["--trainer.max_steps=1"], "has come to step 2, and --trainer.max_steps is 1"),
]


def test_what_would_make_another_training_of_it_is_refused(fit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    args = [*fit, option("optimizer", ADAM), NO_VALIDATION]
    main([*args, "--trainer.max_steps=2"])
    before = files(Path("run"))
    for options, message in REFUSED:
        assert message in stopped([*args, *options, "--ckpt_path=last"], capsys)[1]
        assert files(Path("run")) == before


def test_a_moving_average_comes_and_goes(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    average = settings["trainer"]["callbacks"].pop(0)
    args = ["fit", NO_VALIDATION, "--config", write(Path("without.yaml"), settings)]
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
