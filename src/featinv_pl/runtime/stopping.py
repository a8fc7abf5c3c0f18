"""Ends of training after which nothing is lost: the last step's, a signal's, and Ctrl-C's."""

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from featinv_pl.data.workers import SIGNALS
from featinv_pl.runtime.checkpoints import settle
from featinv_pl.runtime.internals import save_now, savers, take_sigterm
from featinv_pl.runtime.ranks import first_rank, forget_children, mean_of_ranks, say

PAUSE = 1.0  # seconds of training on GPUs in which a signal to one of several ranks stays with that


class Stopped(SIGTERMException):
    """The run was asked to end by a signal, and has done so after a complete batch."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class SaveLast(Callback):
    """Saves the end of training where ModelCheckpoint would not: at a step that its interval does not divide.

    It must come before callbacks that replace the weights at the end. The last step of `max_steps` is saved by `Stop`,
    like any other step: here its epoch would count as over.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (saver := _saver(trainer)) is not None and trainer.global_step != trainer.max_steps:
            save_now(trainer, saver)


class Stop(Callback):
    """Lets SIGTERM, SIGHUP and Ctrl-C end a run after the batch at hand, and saves training, whose ranks end together.

    Lightning's own handling of SIGTERM saves nothing, and ranks wait for each other for ever. A second Ctrl-C ends the
    run at once, without saving. SLURM's signal that announces the end of a job, if Lightning's SLURMEnvironment is to
    requeue it, does the same and has the job start again: Lightning would save in the middle of a step.
    """

    def __init__(self) -> None:
        self.signal = self.requeue = 0
        self.saved = False
        self.launcher: Any = None
        self.batches = self.last = self.due = 0  # those trained on, when ranks asked each other, and will again
        self.since = time.perf_counter()
        self.terminals = [number for number in (1, 2) if os.isatty(number)]
        self.hint = "the same command resumes what is not done yet."

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.launcher, environment = trainer.strategy.launcher, trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeue = int(environment.requeue_signal or signal.SIGUSR1)
        if threading.current_thread() is threading.main_thread():  # no other may; Lightning's own are installed by now
            for number in (*SIGNALS, self.requeue):
                if number and not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                    signal.signal(number, self._note)  # Lightning puts back what was there before it
        if take_sigterm(trainer) and not self.signal:
            self.signal = signal.SIGTERM

    on_test_start = on_predict_start = on_train_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_start(trainer, pl_module)
        self._end(self.saved)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:  # to write to a terminal that is gone would be an error
            with open(os.devnull, "w") as nowhere:
                for terminal in self.terminals:
                    os.dup2(nowhere.fileno(), terminal)
        if not self.signal and number != signal.SIGINT:  # which a terminal sends to all
            if self.launcher is not None:
                self.launcher.kill(number)  # from the first rank to all others
            if (first := first_rank()) is not None:
                os.kill(first, number)  # or from another to the first
        if not self.signal or number == self.requeue:  # SLURM may send SIGTERM after it
            self.signal = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Save if asked; the end comes when what this step has logged is logged."""
        settle(trainer, wait=False)
        asked = self.signal if trainer.world_size == 1 else self._asked(pl_module.device)
        if asked and not trainer.fit_loop._should_accumulate():  # gradients that wait for further batches are not saved
            self.signal = asked
            self._save(trainer)
        elif trainer.global_step == trainer.max_steps and (saver := _saver(trainer)) is not None:
            save_now(trainer, saver)

    def _asked(self, device: torch.device) -> int:
        """The signal that any of several ranks has got: they ask each other after batches of the same number."""
        self.batches += 1
        if self.batches < self.due:
            return 0
        now = time.perf_counter()
        said = [self.signal != 0, self.signal == self.requeue != 0, (now - self.since) / (self.batches - self.last)]
        stop, requeue, seconds = mean_of_ranks(torch.tensor(said, device=device)).tolist()
        self.since, self.last, self.due = now, self.batches, self.batches + (1 if stop else pause(device, seconds))
        return self.requeue if requeue else (self.signal or signal.SIGTERM) if stop else 0

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._end(self.saved)

    on_train_epoch_end = on_train_batch_start

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """End here if asked; several ranks, which validate numbers of batches of their own, return to training."""
        self._end(trainer.state.fn != "fit" or (trainer.world_size == 1 and not trainer.fit_loop._should_accumulate()))

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._end(True)

    on_predict_batch_end = on_test_batch_end

    def _end(self, here: bool) -> None:
        if here and self.signal:
            raise Stopped(self.signal)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped):
            forget_children()  # all ranks have been asked to end
            if not self.saved:
                self._save(trainer)
            say(f"stopped by {signal.Signals(exception.signal).name}; {self.hint}")

    def _save(self, trainer: Trainer) -> None:
        self.saved, requeued = True, self.signal == self.requeue
        if trainer.state.fn == "fit" and (path := _save_at(trainer, requeued)):
            where = f"--ckpt_path {os.path.relpath(path)}"
            settle(trainer)
            self.hint = f"step {trainer.global_step} is saved. Resume: the same command with {where}"
        if requeued and trainer.is_global_zero:
            self.hint += _requeue()


def pause(device: torch.device, seconds: float) -> int:
    """After how many batches of so many seconds ranks ask each other again, for which a GPU has to be waited for."""
    return max(1, int(PAUSE / seconds)) if device.type == "cuda" else 1


def _requeue() -> str:
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:  # whose first task has the number of all
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    with suppress(OSError):  # there is no scontrol
        if subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0:
            return f" (SLURM does that: job {job} is requeued)"
    return " (scontrol requeue has failed)"


def _saver(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that keeps the latest state, rather than the best."""
    return next((one for one in savers(trainer) if one.monitor is None and one.save_top_k != 0), None)


def _save_at(trainer: Trainer, requeued: bool) -> str:
    """Save as the run does, and return the path; an empty one if it saves nothing."""
    if not requeued and (saver := _saver(trainer)) is not None:
        save_now(trainer, saver)
        return saver.best_model_path
    if requeued:
        path = str(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
    elif isinstance(best := trainer.checkpoint_callback, ModelCheckpoint) and not cast(Any, trainer).fast_dev_run:
        path = str(Path(best.dirpath or ".", f"{best.CHECKPOINT_NAME_LAST}{best.FILE_EXTENSION}"))
    else:
        return ""
    trainer.save_checkpoint(path)
    return path
