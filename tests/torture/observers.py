"""What runs under torture leave beside their results: the samples that they read, and what their loggers were told."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

SEEN, ROWS = "seen-{}.jsonl", "rows.jsonl"
TIMED = ("train/samples_per_second", "epoch")  # the one is measured, the other Lightning's at the end of a validation


class Recorder(Callback):
    """Appends a line for each batch that is trained on or evaluated: what for, the step, and the samples."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._write(trainer, "train", batch)

    def on_validation_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._write(trainer, "validate", batch)

    def on_test_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, *_: Any) -> None:
        self._write(trainer, "test", batch)

    def _write(self, trainer: Trainer, stage: str, batch: Any) -> None:
        with Path(SEEN.format(trainer.global_rank)).open("a") as file:
            file.write(json.dumps([stage, trainer.global_step, batch["key"]]) + "\n")


class Rows(Logger):
    """Appends a line for each row of metrics."""

    name = version = "rows"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with Path(ROWS).open("a") as file:
            file.write(json.dumps([step, {name: metrics[name] for name in metrics if name not in TIMED}]) + "\n")


def lines(path: Path) -> list[Any]:
    """All complete lines: a kill may come within one."""
    found = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in found if line.endswith("]")]
