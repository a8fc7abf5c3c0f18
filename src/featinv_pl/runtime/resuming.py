"""Resumes from within a step: what a checkpoint has found unfinished is finished first."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from featinv_pl.data.order import ResumableData
from featinv_pl.runtime.internals import position, savers

KEY = "unfinished"  # of a checkpoint
RUN_ID = "wandb_run_id"  # likewise


class Resume(Callback):
    """Makes training that resumes from any checkpoint indistinguishable from one that never stopped.

    A checkpoint is mostly written before a step is over: loggers have not been told of it, and its validation is still
    to come or was cut short. Lightning would begin the next step. Here loggers are told before the checkpoint is
    written, the validation is held from its first sample on, and a training whose last step was not over comes to its
    end. Earlier metrics are restored, and so is torch's random state, which belongs to training alone: random numbers
    of validation and loaders change nothing. A run at W&B is continued by its id.
    """

    def __init__(self) -> None:
        self.validating = False
        self.random: list[Tensor] | None = None
        self.unfinished: dict[str, Any] | None = None
        self.limits: tuple[int, int | None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = cast(Any, trainer).datamodule
        if isinstance(data, ResumableData):
            data.position = partial(position, trainer)  # tells it where training stands

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        within_step = progress.processed > progress.completed
        if within_step:
            _tell_loggers(trainer)
        checkpoint[KEY] = {
            "validation": self.validating or (within_step and _validates(trainer)),
            "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            "deferred": [saver.state_key for saver in savers(trainer) if saver._defer_save_until_validation],
            "random": self.random,
        }
        for logger in trainer.loggers:
            logger.save()
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                checkpoint[RUN_ID] = logger.version

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.unfinished = checkpoint.get(KEY)
        if self.unfinished is None or trainer.state.fn != "fit":
            return
        self.random = self.unfinished["random"]
        for saver in savers(trainer):
            saver._defer_save_until_validation = saver.state_key in self.unfinished["deferred"]
        loop, loops = trainer.fit_loop, checkpoint["loops"]["fit_loop"]
        if self.unfinished["validation"] and trainer.enable_validation:
            _as_if_validating(loops)
        # Lightning would not begin at all with a training whose steps are made, and so leave out its end.
        self.limits = loop.max_steps, loop.max_epochs
        if loop.max_steps == checkpoint["global_step"]:
            loop.epoch_loop.max_steps += 1
        if loop.max_epochs is not None and loop.max_epochs == loops["epoch_progress"]["current"]["processed"]:
            loop.max_epochs += 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.unfinished is None:
            return
        epoch: Any = trainer.fit_loop.epoch_progress.current
        if epoch.ready == epoch.started == epoch.processed:  # Lightning has ended one, and would not count the next
            trainer.fit_loop.reset_restart_stage()
        for saver in savers(trainer):  # a checkpoint cannot know that it will be there
            path = saver.best_model_path
            if path and Path(path).absolute() == Path(str(trainer.ckpt_path)).absolute():
                saver._last_global_step_saved = trainer.global_step
        metrics = {name: value.to(pl_module.device) for name, value in self.unfinished["metrics"].items()}
        cast(Any, trainer)._logger_connector._callback_metrics.update(metrics)
        if not (self.unfinished["validation"] and _validates(trainer)):
            self._limit(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.random is not None:
            torch.set_rng_state(self.random[0])
            if pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(self.random[1], pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self.random = [torch.get_rng_state()]
        if pl_module.device.type == "cuda":
            self.random.append(torch.cuda.get_rng_state(pl_module.device))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validating = True  # until its end, a validation counts for nothing

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validating = False  # from here on loggers and callbacks know it
        self._limit(trainer)

    def _limit(self, trainer: Trainer) -> None:
        """End training where it should end, now that what was unfinished is done."""
        if self.limits is not None:
            trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = self.limits
            self.limits = None


def _validates(trainer: Trainer) -> bool:
    """Whether the step at hand is followed by a validation."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def _tell_loggers(trainer: Trainer) -> None:
    """Tell them of the step at hand now, and let Lightning, which would do so in a moment, pass once."""
    connector: Any = trainer._logger_connector
    if "update_train_step_metrics" not in vars(connector):
        connector.update_train_step_metrics()
        connector.update_train_step_metrics = lambda: delattr(connector, "update_train_step_metrics")


def _as_if_validating(loops: dict[str, Any]) -> None:
    """Make the progress of a checkpoint that of a validation which has just begun: Lightning goes back to such."""
    for progress in (loops["epoch_loop.batch_progress"][part] for part in ("total", "current")):
        progress["completed"] = progress["processed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["current"] = dict.fromkeys(validation["current"], 0)
    validation["is_last_batch"] = False
