"""Weights that a training keeps: their moving average, and no numbers that are not finite."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from conftest import MakeBatch
from featinv_pl.__main__ import main
from featinv_pl.nets.control import Encoder
from featinv_pl.runtime.averaging import MovingAverage
from featinv_pl.tasks.inversion import FeatureInversion
from interrupts import Capture, added, checkpoint, stopped
from tiny import TRAINER, write

DECAY = 0.8


class History(Callback):
    """Keeps the weights after each step, and those that validation sees."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self.weights.append({name: value.clone() for name, value in pl_module.inverter.control.state_dict().items()})

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self.validated.append({name: value.clone() for name, value in pl_module.inverter.control.state_dict().items()})


def test_average_is_validated_and_kept(
    classifier_folder: Path, prior_folder: Path, make_batch: MakeBatch, tmp_path: Path
) -> None:
    model = FeatureInversion(str(classifier_folder), str(prior_folder), encoder=Encoder(8))
    frozen = dict(model.inverter.digests)
    history, average = History(), MovingAverage(DECAY)
    options: dict[str, Any] = {**TRAINER, "max_steps": 5, "default_root_dir": tmp_path, "enable_progress_bar": False}
    batches: Any = [make_batch(4)] * 5
    Trainer(**options, callbacks=[history, average]).fit(
        model, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None)
    )
    expected = history.weights[0]  # the first step starts it
    for step in history.weights[1:]:
        expected = {name: DECAY * old + (1 - DECAY) * step[name] for name, old in expected.items()}
    [checkpoint] = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    for name, value in expected.items():
        torch.testing.assert_close(history.validated[0][name], value)
        torch.testing.assert_close(saved["state_dict"][f"control.{name}"], value)
        torch.testing.assert_close(model.inverter.control.state_dict()[name], value)
        assert torch.equal(saved["current_model_state"][f"control.{name}"], history.weights[-1][name])
    assert {name.split(".")[0] for name in saved["state_dict"]} == {"control", "regression"}
    del model.inverter.digests
    assert model.inverter.digests == frozen
    assert any(not torch.equal(value, history.weights[-1][name]) for name, value in expected.items())
    copied: Any = average._average_model
    assert copied.module.inverter.prior is model.inverter.prior  # frozen parts take no second place in memory


SAMPLES = r"The samples were: (\d+, ){7}\d+ and 8 more\."


FUSED = ["--model.optimizer=AdamW", "--model.optimizer.fused=true"]  # which leaves a step out by itself


@pytest.mark.parametrize(
    ("what", "more", "message"),
    [
        ("loss", [], rf"step 3: loss inf, norm of the gradients .*{SAMPLES}"),
        ("loss", FUSED, rf"step 3: loss inf, norm of the gradients nan.*{SAMPLES}"),
        ("gradient", FUSED, rf"norm of the gradients nan\. Such a step .*{SAMPLES} Resume \(--ckpt_path last\)"),
        ("weight", [], r"step 4: 1 weights are not finite, such as \S*control\.\S+, so they are not saved"),
    ],
)
def test_what_would_spoil_the_weights_ends_training(
    what: str, more: list[str], message: str, fit: list[str], capsys: Capture
) -> None:
    code, line = stopped([*fit, *more, *added("Spoil", what=what)], capsys)
    assert code == 1
    assert re.search(message, line)
    assert checkpoint()["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint()["state_dict"].values())


@pytest.mark.parametrize("more", [[], FUSED])
def test_a_step_may_be_skipped(more: list[str], settings: dict[str, Any], capsys: Capture) -> None:
    """It changes neither weights nor moments, and is counted, if need be at the next step."""
    saver = settings["trainer"]["callbacks"][1]["init_args"]
    saver |= {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
    settings["trainer"] |= {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}}
    settings["trainer"]["log_every_n_steps"] = 1
    guard = ["--trainer.callbacks+=FiniteGuard", "--trainer.callbacks.max_skipped=1"]
    args = ["fit", "--config", write(Path("fit.yaml"), settings), *more]
    main([*args, *added("Spoil", what="gradient"), *guard])
    before, after, end = (checkpoint(f"run/step={step}.ckpt")["current_model_state"] for step in (3, 4, 5))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not all(torch.equal(end[name], weight) for name, weight in before.items())
    [metrics] = Path("logs").rglob("metrics.csv")
    counted = [row for row in csv.DictReader(metrics.open()) if row["train/skipped"]]
    assert (counted[0]["step"], counted[-1]["train/skipped"]) == ("4" if more else "3", "1.0")
    assert len({str(checkpoint(f"run/step={step}.ckpt")["optimizer_states"][0]["state"]) for step in (3, 4, 5)}) == 2

    capsys.readouterr()  # the allowance is that of a whole training
    code, line = stopped([*args, *added("Spoil", what="losses"), *guard, "--ckpt_path=run/step=4.ckpt"], capsys)
    assert code == 1
    assert "step 4: loss inf" in line
