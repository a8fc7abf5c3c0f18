"""What a training did, seen from within."""

from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Watch(Callback):
    """Notes the optimizer steps and validations of the training that this process has run last."""

    first: ClassVar[int] = 0
    last: ClassVar[int] = 0
    validations: ClassVar[int] = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Watch.first, Watch.last, Watch.validations = trainer.global_step, trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert torch.isfinite(outputs["loss"]), f"the loss of step {trainer.global_step} is {outputs['loss']}"
        Watch.last = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            Watch.validations += 1
