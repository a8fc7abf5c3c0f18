"""Callbacks that do to a run what may happen to one, and what is asked of runs that it happened to."""

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from featinv_pl.__main__ import main

Capture = pytest.CaptureFixture[str]
STEPS = 5  # of epochs of three
PATIENCE_S = 1800.0  # far more than anything takes on a busy machine


class Interrupt(Callback):
    """Sends this process signals after a step, a batch of predict, or while that is validated; or its whole group."""

    def __init__(self, numbers: list[int], step: int = 0, validating: bool = False, group: bool = False) -> None:
        self.numbers, self.step, self.validating, self.group = numbers, step, validating, group

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.validating and trainer.global_rank == trainer.world_size - 1:
            self._send()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and self.validating:
            self._send()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == self.step:
            self._send()

    def _send(self) -> None:
        for number in self.numbers:
            if self.group:
                assert multiprocessing.active_children(), "the loader has no workers"
                subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgrp()}"], check=False)
            else:
                os.kill(os.getpid(), number)


class LoseWorker(Callback):
    """Kills a worker, as the kernel does where memory is short."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            multiprocessing.active_children()[0].kill()


class Sent(Callback):
    """Pickles the run as `ddp_spawn` does."""

    bytes: ClassVar[int] = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Sent.bytes = len(ForkingPickler.dumps((trainer, pl_module)))


class Validated(Callback):
    """Notes the samples that each validation sees."""

    keys: ClassVar[dict[int, list[str]]] = {}

    def on_validation_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.keys.setdefault(trainer.global_step, []).extend(batch["key"])


class Spoil(Callback):
    """Makes a number of a `loss`, `gradient` or `weight` infinite or NaN at step 3; `losses`: of each loss."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        if self.what == "losses" or (trainer.global_step == 3 and self.what == "loss"):
            loss.data.fill_(torch.inf)

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step == 3 and self.what == "gradient":
            next(one.grad for one in module.parameters() if one.grad is not None).view(-1)[0] = torch.nan

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 4 and self.what == "weight":
            next(one for one in module.parameters() if one.requires_grad).data.view(-1)[0] = torch.inf


def added(name: str, **arguments: Any) -> list[str]:
    """Options that add a callback of this module."""
    options = [f"--trainer.callbacks+={__name__}.{name}"]
    return options + [f"--trainer.callbacks.{key}={value}" for key, value in arguments.items()]


def checkpoint(path: str | Path = "run/inversion.ckpt") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def weights(path: str | Path = "run/inversion.ckpt", steps: int = STEPS) -> dict[str, Tensor]:
    """All that the last checkpoint holds of weights, their average and the optimizer."""
    found = checkpoint(path)
    assert found["global_step"] == steps
    moments = found["optimizer_states"][0]["state"]
    return {
        **found["current_model_state"],
        **{f"average {name}": value for name, value in found["state_dict"].items()},
        **{f"{name} {key}": value for name, state in moments.items() for key, value in state.items()},
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def stopped(args: list[str], capsys: Capture) -> tuple[int | str | None, str]:
    """The exit status of a command that does not come to its end, and its last line."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    return caught.value.code, capsys.readouterr().err.splitlines()[-1]


def eventually(check: Callable[[], bool]) -> bool:
    """Whether something comes to be."""
    end = time.monotonic() + PATIENCE_S
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
