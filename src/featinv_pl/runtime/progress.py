"""One progress line for all of a command, with its rate and the time left."""

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

Item = TypeVar("Item")


class Progress(ProgressBar):
    """Counts optimizer steps in `fit`, and batches of all test sets together elsewhere.

    Lightning's own bars begin again with each epoch and each test set, so they never show the time that is left.
    Where the output is not a terminal, a line follows every ten seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm[Any] | None = None
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self._open("fit", "step", None if steps == float("inf") else int(steps), trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._open("validate", "batch", int(sum(trainer.num_val_batches)))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("test", "batch", int(sum(trainer.num_test_batches)))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("predict", "batch", int(sum(trainer.num_predict_batches)))

    def _open(self, name: str, unit: str, total: int | None, initial: int = 0) -> None:
        if self.enabled:
            self.bar = tqdm(**_look(name, unit), total=total, initial=initial)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.bar is not None:
            scalars = {name: f"{float(value):.4g}" for name, value in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix(scalars, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        if self.bar is not None and self.trainer.state.fn != "fit":
            self.bar.update()

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _advance

    def _close(self, *args: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    on_train_end = on_test_end = on_predict_end = on_exception = _close

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._close()


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
