"""Undocumented names of Lightning that several modules use; `test_contract.py` lists them all."""

import logging
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI


class CommandLine(LightningCLI):
    """Lightning's command line without hyper-parameters: neither copied into models, nor taken from a checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.asked = kwargs["args"][:1]
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The given command alone, whose parser takes a while to build; all of them where none is given."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in self.asked if name in every} or every

    def _add_instantiators(self) -> None:
        """Let classes be made by their constructors."""

    def _parse_ckpt_path(self) -> None:
        """Do not read hyper-parameters from the checkpoint."""


def silence_tips() -> None:
    """Hide the services that Lightning advertises at the start of every run."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "Tip:" not in record.getMessage())


def drop_deprecated(trainer: Trainer) -> None:
    """Keep WandbLogger from passing on a setting that W&B warns about, whether or not it has a value."""
    for logger in trainer.loggers:
        settings = getattr(logger, "_wandb_init", {})
        if settings.get("anonymous", "") is None:
            del settings["anonymous"]


def hide_score_tables(trainer: Trainer) -> None:
    """Keep Lightning from printing a line for each score at the end of `validate` and `test`."""
    trainer.validate_loop.verbose = trainer.test_loop.verbose = False


def take_sigterm(trainer: Trainer) -> bool:
    """Whether Lightning has got SIGTERM, which from now on is not its concern.

    With several ranks it would ask the first one before each batch, and wait for the answer and so for the device.
    """
    signals, loop = trainer._signal_connector, cast(Any, trainer.fit_loop.epoch_loop)
    loop._broadcast_sigterm_tensor = _ask_nobody
    received, signals.received_sigterm = signals.received_sigterm, False
    return received


def _ask_nobody() -> None: ...


def position(trainer: Trainer) -> tuple[int, int]:
    """The epoch in which training stands, and how many batches of it have been processed."""
    loop = trainer.fit_loop
    epoch, batch = cast(Any, loop.epoch_progress.current), cast(Any, loop.epoch_loop.batch_progress)
    if epoch.started == epoch.processed:
        return epoch.processed, 0
    # Within an epoch, or after its last batch but before its end.
    return (epoch.processed + 1, 0) if batch.is_last_batch else (epoch.processed, batch.current.processed)


def logs_step(trainer: Trainer) -> bool:
    """Whether what the training step at hand logs goes to loggers."""
    return trainer._logger_connector.should_update_logs


def uploads(trainer: Trainer) -> bool:
    """Whether a logger sends checkpoints elsewhere as soon as they are saved."""
    return any(getattr(logger, "_log_model", False) for logger in trainer.loggers)


def savers(trainer: Trainer) -> list[ModelCheckpoint]:
    """The ModelCheckpoint callbacks of a trainer."""
    return [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]


def save_now(trainer: Trainer, saver: ModelCheckpoint) -> None:
    """Let a ModelCheckpoint save, by its names and rules."""
    if not saver._should_skip_saving_checkpoint(trainer):
        candidates = saver._monitor_candidates(trainer)
        saver._save_topk_checkpoint(trainer, candidates)
        saver._save_last_checkpoint(trainer, candidates)
