"""Ends of training after which nothing is lost: the last step's, a signal's, and Ctrl-C's."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SIGTERMException):
    """The run was asked to end, and has done so after a whole batch.

    Args:
        signal: What asked.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class SaveLast(Callback):
    """Saves the end of training where ModelCheckpoint would not: at a step that its interval does not divide.

    It must come before callbacks that replace the weights at the end.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the last step is saved already."""
        saver = _saver(trainer)
        if saver is not None:
            _save(trainer, saver)


class Stop(Callback):
    """Lets SIGTERM and Ctrl-C end a run after the batch at hand, and saves training, whose ranks end together.

    Lightning's own handling of SIGTERM saves nothing, and with several ranks they wait for each other for ever. A
    second Ctrl-C ends the run at once, without saving.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.saved = False
        self.path: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, now that Lightning has installed its own handlers."""
        self._listen()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, unless this is where to end."""
        self._listen()
        self._end(self.saved)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen()

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may
            for number in SIGNALS:
                signal.signal(number, self._note)  # Lightning puts back what was there before it

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Save if asked; the end comes when what this step has logged is logged."""
        if trainer.strategy.reduce_boolean_decision(self.signal != 0, all=False):
            self.signal = self.signal or signal.SIGTERM
            self.saved, self.path = True, _save_stopped(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """End here if saved."""
        self._end(self.saved)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End here if saved."""
        self._end(self.saved)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """End here if asked; several ranks, which validate numbers of batches of their own, only go on to train."""
        self._end(trainer.state.fn != "fit" or trainer.world_size == 1)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """End here if asked."""
        self._end()

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """End here if asked."""
        self._end()

    def _end(self, here: bool = True) -> None:
        if here and self.signal:
            raise Stopped(self.signal)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what a stopped training has come to, and say how to go on."""
        if not isinstance(exception, Stopped):
            return
        if trainer.state.fn == "fit" and not self.saved:
            self.path = _save_stopped(trainer)
        if trainer.is_global_zero:
            name = signal.Signals(exception.signal).name
            if self.path is None:
                hint = "the same command goes on with what is not done yet."
            else:
                hint = f"step {trainer.global_step} is saved. Go on: the same command with --ckpt_path {self.path}"
            print(f"featinv-pl: stopped by {name}; {hint}", file=sys.stderr)


def _saver(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that keeps the latest state, rather than the best."""
    savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    return next((one for one in savers if one.monitor is None and one.save_top_k != 0), None)


def _save(trainer: Trainer, saver: ModelCheckpoint) -> None:
    """Let a ModelCheckpoint save now, by its names and rules."""
    if not saver._should_skip_saving_checkpoint(trainer):
        candidates = saver._monitor_candidates(trainer)
        saver._save_topk_checkpoint(trainer, candidates)
        saver._save_last_checkpoint(trainer, candidates)


def _save_stopped(trainer: Trainer) -> str | None:
    saver = _saver(trainer)
    if saver is not None:
        _save(trainer, saver)
        path = saver.best_model_path
    elif isinstance(best := trainer.checkpoint_callback, ModelCheckpoint) and not cast(Any, trainer).fast_dev_run:
        path = str(Path(best.dirpath or ".", f"{best.CHECKPOINT_NAME_LAST}{best.FILE_EXTENSION}"))
        trainer.save_checkpoint(path)
    else:
        return None
    return os.path.relpath(path) if path else None
