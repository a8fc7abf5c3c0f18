"""A moving average of what is trained."""

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from featinv_pl.errors import UserError


class MovingAverage(WeightAveraging):
    """Keeps an exponential moving average of the trained weights, validates with it, and ends with it.

    Lightning's own `WeightAveraging`, but that frozen parts are shared with the average instead of copied, that it
    lives where the model does, and that it takes checkpoints which hold the trained half alone. A checkpoint's
    `state_dict` is the average; training resumes from `current_model_state`.

    Args:
        decay: Share (0 to 1) of the old average that each step keeps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise UserError(f"`decay` must lie between 0 and 1, and is {decay}.")
        super().__init__(use_buffers=False, multi_avg_fn=partial(_average, decay))
        self.decay = decay
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._swapped:  # while it is validated; the model's own weights may be saved now
            self._swap_models(pl_module)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None:
            checkpoint["state_dict"] = self._average_model.module.state_dict()  # the trained half alone

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:  # outside of training the average is all there is
            self._average_model.module.load_state_dict(checkpoint["state_dict"])
            if "averaging_state" in checkpoint:
                self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
                pl_module.load_state_dict(checkpoint["current_model_state"])


def _average(decay: float, averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
    for old, new in zip(averages, weights, strict=True):
        if old.data_ptr() != new.data_ptr():  # what is shared is frozen
            old.lerp_(new, 1 - decay)
