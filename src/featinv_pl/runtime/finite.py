"""Stops training at the first NaN or Inf."""

from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from featinv_pl.errors import UserError
from featinv_pl.runtime.clipping import Clipped, scales_gradients, total_norm

NAMED = 8  # samples in a message


class FiniteGuard(Callback):
    """Ends training before a step whose loss or gradients are not finite, and never saves weights that are not.

    Lightning would train on, and save what is left. The command adds this callback by itself; name it to let a few
    steps be skipped instead, which is counted as `train/skipped`.

    Args:
        max_skipped: Steps that may be skipped in a whole training, without any change of weights or moments.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        if max_skipped < 0:
            raise UserError(f"--trainer.callbacks.max_skipped must be 0 or more, and is {max_skipped}.")
        self.max_skipped, self.skipped = max_skipped, 0
        self.keys: list[str] = []
        self.loss: Tensor | float = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the samples of a step, which may be of several batches."""
        self.keys += batch.get("key", []) if isinstance(batch, dict) else []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss of a step, without waiting for it."""
        self.loss = self.loss + loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at loss and gradients, at once.

        Raises:
            UserError: One of them is not finite, and no step may be skipped any more.
        """
        keys, loss, self.keys, self.loss = self.keys, torch.as_tensor(self.loss), [], 0.0
        if scales_gradients(trainer):  # whose scaler looks at the gradients itself
            norm = torch.zeros_like(loss)
        else:
            norm = total_norm(optimizer).to(loss.device)
            if isinstance(pl_module, Clipped):
                pl_module.gradient_norm = norm
        figures = torch.stack([loss.float(), norm.float()]).tolist()
        finite = bool(torch.tensor(figures).isfinite().all())
        if trainer.strategy.reduce_boolean_decision(finite):
            return
        if self.skipped < self.max_skipped:
            self.skipped += 1
            optimizer.zero_grad()  # to none: an optimizer leaves alone what has no gradient
            pl_module.log("train/skipped", float(self.skipped), batch_size=1)
            return
        named = ", ".join(islice(keys, NAMED)) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")
        raise UserError(
            f"step {trainer.global_step}: loss {figures[0]:g}, norm of the gradients {figures[1]:g}. Such a step would "
            f"spoil the weights, so training has ended before it, and the last checkpoint is good. The samples were: "
            f"{named or 'not named'}. Lower the learning rate (--ckpt_path last applies it) or clip gradients "
            "(--trainer.gradient_clip_val), or skip such steps: --trainer.callbacks+=FiniteGuard "
            "--trainer.callbacks.max_skipped=10."
        )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that are not finite: an optimizer can make some of finite gradients."""
        learned = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        for part in ("state_dict", "current_model_state"):
            weights = checkpoint.get(part, {})
            spoilt = [name for name in learned if name in weights and not weights[name].isfinite().all()]
            if spoilt:
                raise UserError(
                    f"step {trainer.global_step}: {len(spoilt)} weights are not finite, such as {spoilt[0]}, so they "
                    "are not saved, and the last checkpoint is good. Go on from it with a lower learning rate."
                )

    def state_dict(self) -> dict[str, Any]:
        """The number of steps skipped so far."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting from it."""
        self.skipped = state_dict["skipped"]
