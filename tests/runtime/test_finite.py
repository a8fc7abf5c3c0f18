"""No step and no checkpoint whose numbers are not finite."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.runtime.finite import FiniteGuard
from interrupts import Capture, added, checkpoint, stopped
from tiny import write

SAMPLES = r"The samples were: (\d+, ){7}\d+ and 8 more\."


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loss", rf"step 3: loss inf, norm of the gradients .*{SAMPLES}"),
        ("gradient", rf"norm of the gradients nan\. Such a step .*{SAMPLES} Resume \(--ckpt_path last\)"),
        ("weight", r"step 4: 1 weights are not finite, such as \S*control\.\S+, so they are not saved"),
    ],
)
def test_what_would_spoil_the_weights_ends_training(what: str, message: str, fit: list[str], capsys: Capture) -> None:
    code, line = stopped([*fit, *added("Spoil", what=what)], capsys)
    assert code == 1
    assert re.search(message, line)
    assert checkpoint()["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint()["state_dict"].values())


def test_a_step_may_be_skipped(settings: dict[str, Any], capsys: Capture) -> None:
    """It changes neither weights nor moments, and is counted."""
    saver = settings["trainer"]["callbacks"][1]["init_args"]
    saver |= {"filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
    settings["trainer"] |= {"logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}}
    settings["trainer"]["log_every_n_steps"] = 1
    guard = ["--trainer.callbacks+=FiniteGuard", "--trainer.callbacks.max_skipped=1"]
    args = ["fit", "--config", write(Path("fit.yaml"), settings)]
    main([*args, *added("Spoil", what="gradient"), *guard])
    before, after, end = (checkpoint(f"run/step={step}.ckpt")["current_model_state"] for step in (3, 4, 5))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not all(torch.equal(end[name], weight) for name, weight in before.items())
    [metrics] = Path("logs").rglob("metrics.csv")
    counted = [row for row in csv.DictReader(metrics.open()) if row["train/skipped"]]
    assert (counted[0]["step"], counted[-1]["train/skipped"]) == ("3", "1.0")

    capsys.readouterr()  # the allowance is that of a whole training
    code, line = stopped([*args, *added("Spoil", what="losses"), *guard, "--ckpt_path=run/step=4.ckpt"], capsys)
    assert code == 1
    assert "step 4: loss inf" in line


def test_no_negative_number_of_steps_is_skipped() -> None:
    with pytest.raises(UserError, match="`max_skipped` must be 0 or more, and is -1"):
        FiniteGuard(-1)
