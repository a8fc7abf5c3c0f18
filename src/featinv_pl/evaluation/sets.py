"""What validation and testing have in common for a callback."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from featinv_pl.types import Batch, Reconstruction


def results_root(trainer: Trainer) -> Path:
    """The folder that an evaluation writes below: `validate` has its own, so that it leaves what `test` wrote."""
    root = Path(trainer.default_root_dir)
    return root / "validate" if trainer.state.fn == "validate" else root


class EvaluationCallback(Callback, ABC):
    """Sees every batch and its reconstructions, in validation and in testing alike."""

    @abstractmethod
    def start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start afresh. `stage` is `validate` or `test`."""

    @abstractmethod
    def update(self, batch: Batch, outputs: Reconstruction) -> None:
        """Take in one batch."""

    @abstractmethod
    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All batches of all sources have been seen."""

    def end(self, trainer: Trainer) -> None:
        """The stage is over, and its progress line is closed."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self.start(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self.start(trainer, pl_module, "test")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """See."""
        self.update(batch, outputs)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """See."""
        self.update(batch, outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish."""
        self.finish(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish."""
        self.finish(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self.end(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End."""
        self.end(trainer)
