"""One progress line for a whole stage, with its rate and the time left."""

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

Item = TypeVar("Item")


class Progress(ProgressBar):
    """Counts optimizer steps in `fit`, and batches of all sources together elsewhere.

    Lightning's own bars start anew each epoch and each source, so they never show the time that the
    whole job still takes. Where the output is no terminal, a line follows every ten seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm[Any] | None = None
        self.enabled = True

    def disable(self) -> None:
        """Called on all ranks but the first."""
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        total = trainer.estimated_stepping_batches
        self._open("fit", "step", None if total == float("inf") else int(total), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the newest scalars."""
        if self.bar is not None:
            scalars = {name: f"{float(value):.4g}" for name, value in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix(scalars, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar, unless this is within `fit`."""
        if trainer.state.fn == "validate":
            self._open("validate", "batch", int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        if trainer.state.fn == "validate":
            self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if trainer.state.fn == "validate":
            self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        self._open("test", "batch", int(sum(trainer.num_test_batches)))

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        self._advance()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        self._open("predict", "batch", int(sum(trainer.num_predict_batches)))

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Advance."""
        self._advance()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal in order."""
        self._close()

    def _open(self, name: str, unit: str, total: int | None, initial: int = 0) -> None:
        if self.enabled:
            self.bar = tqdm(**_look(name, unit), total=total, initial=initial)

    def _advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def hide_score_tables(trainer: Trainer) -> None:
    """Keep Lightning from printing a line for each score at the end of `validate` and `test`."""
    trainer.validate_loop.verbose = trainer.test_loop.verbose = False


def progress(trainer: Trainer, name: str, unit: str, items: Iterable[Item]) -> Iterable[Item]:
    """Show a line for what is done before a stage, on the first rank, if the stage has one."""
    shown: Iterable[Item] = tqdm(
        items, **_look(name, unit), disable=not trainer.is_global_zero or trainer.progress_bar_callback is None
    )
    return shown


def _look(name: str, unit: str) -> dict[str, Any]:
    interval = 0.1 if sys.stderr.isatty() else 10
    return {"desc": name, "unit": f" {unit}", "mininterval": interval, "dynamic_ncols": True}
