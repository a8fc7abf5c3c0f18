"""One progress line for all of a command, with its rate and the time left; how fast training is, for loggers."""

import math
import time
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from featinv_pl.bars import style

Item = TypeVar("Item")
SHOWN = 50  # steps after which the loss in the progress line is another, if nothing is logged


class Progress(ProgressBar):
    """Counts optimizer steps in `fit`, and batches of all test sets together elsewhere.

    Lightning's own bars begin again with each epoch and each test set, so they never show the time that is left.
    Where the output is not a terminal, a line follows every ten seconds; see `bars`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm[Any] | None = None
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            self.bar = tqdm(**_shown("fit", "step"), total=_planned(trainer), initial=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.bar is not None:
            every = cast(Any, trainer).log_every_n_steps or SHOWN
            if trainer.global_step % every == 0 or not self.bar.postfix:  # to read the loss is to wait for the device
                shown = {name: one for name, one in trainer.callback_metrics.items() if name == "train/loss"}
                self.bar.set_postfix({name: f"{float(one):.4g}" for name, one in shown.items()}, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def _open(self, *args: Any, **kwargs: Any) -> None:
        command = str(self.trainer.state.fn.value) if self.trainer.state.fn else "fit"
        if self.enabled and command != "fit":  # within which it also validates
            batches = getattr(self.trainer, f"num_{'val' if command == 'validate' else command}_batches")
            self.bar = tqdm(**_shown(command, "batch"), total=int(sum(batches)))

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        if self.bar is not None and self.trainer.state.fn != "fit":
            self.bar.update()
            if self.bar.n == self.bar.total:  # before results are printed
                self._close()

    def _close(self, *args: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._close()

    on_validation_start = on_test_start = on_predict_start = _open
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _advance
    on_train_end = on_test_end = on_predict_end = on_exception = _close


def _planned(trainer: Trainer) -> int | None:
    """The steps of training, without what `Resume` adds so that one that was finished before may start."""
    steps = trainer.estimated_stepping_batches
    found = (getattr(one, "limits", None) for one in cast(Any, trainer).callbacks)
    max_steps, epochs = next(filter(None, found), (-1, None))
    if max_steps >= 0:
        steps = min(steps, max_steps)
    if epochs is not None and epochs >= 0:
        steps = min(steps, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * epochs)
    return None if steps == float("inf") else int(steps)


def _shown(name: str, unit: str) -> dict[str, Any]:
    return style(name, unit) | {"delay": 0}  # a log says of a stage at least that it began and ended


def progress(trainer: Trainer, name: str, unit: str, items: Iterable[Item]) -> Iterable[Item]:
    """Show a line for what is done before a stage, on the first rank, if the stage has one."""
    hidden = not trainer.is_global_zero or trainer.progress_bar_callback is None
    shown: Iterable[Item] = tqdm(items, **style(name, unit), disable=hidden)
    return shown


class Speed(Callback):
    """Logs `train/samples_per_second`, and on a GPU `train/peak_memory_gib`.

    Samples are those of all processes, per second of training alone: validation does not count.
    Lightning's ThroughputMonitor would wait for the GPU after every batch, which this does not.
    """

    def __init__(self) -> None:
        self.samples = self.logged = 0
        self.start = self.paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.samples, self.logged, self.start = 0, trainer.global_step, time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start += time.perf_counter() - self.paused

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch["key"])
        interval, step = cast(Any, trainer).log_every_n_steps, trainer.global_step
        if interval and step % interval == 0 and step != self.logged:  # of several batches that make a step, the last
            now = time.perf_counter()
            rate = self.samples * trainer.world_size / (now - self.start)
            pl_module.log("train/samples_per_second", rate, batch_size=1)
            if pl_module.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
                pl_module.log("train/peak_memory_gib", peak, batch_size=1)
            self.samples, self.logged, self.start = 0, step, now
