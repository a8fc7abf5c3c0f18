"""Stops training at the first NaN or Inf."""

from collections.abc import Callable
from math import isfinite
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, MixedPrecision
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.optim import Adam, Optimizer

from featinv_pl.errors import UserError

NAMED = 8  # samples in a message


class FiniteGuard(Callback):
    """Ends training before a step whose loss or gradients are not finite, and never saves weights that are not.

    Lightning would train on, and save what is left. The command adds this callback by itself; name it to let a few
    steps be skipped instead, which is counted as `train/skipped`.

    A fused Adam leaves such a step out by itself, on the device, which is therefore not waited for: what a step was is
    looked at before the next one, or before anything is saved. With other optimizers it is before the step.

    Args:
        max_skipped: Steps that may be skipped in a whole training, without any change of weights or moments.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        if max_skipped < 0:
            raise UserError(f"`max_skipped` must be 0 or more, and is {max_skipped}.")
        self.max_skipped, self.skipped, self.logged = max_skipped, 0, 0
        self.keys: list[str] = []
        self.loss: Tensor | float = 0.0
        self.unseen: _Step | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.keys += batch.get("key", []) if isinstance(batch, dict) else []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.loss = self.loss + (own := loss.detach())  # without waiting for it; a step may be of several batches
        loss.register_hook(lambda gradient: gradient + own * 0)  # NaN for a loss that is not finite, so on all ranks

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._look()
        keys, loss, self.keys, self.loss = self.keys, torch.as_tensor(self.loss), [], 0.0
        norm = torch.zeros_like(loss)
        if not scales_gradients(trainer):  # whose scaler checks the gradients itself
            norm = total_norm(optimizer).to(loss.device)
            cast(Any, pl_module).gradient_norm = norm  # for clipping by it
        figures = torch.stack([loss.float(), norm.float()])
        self.unseen = _Step(trainer.global_step, keys, figures)
        if _leaves_out(optimizer, trainer):
            cast(Any, optimizer).found_inf = (~figures[1].isfinite()).float()
        elif not self._look(trainer.strategy.reduce_boolean_decision):
            optimizer.zero_grad()  # to none: an optimizer leaves alone what has no gradient
        if self.skipped != self.logged:
            self.logged = self.skipped
            pl_module.log("train/skipped", float(self.skipped), batch_size=1)

    def _look(self, agreed: Callable[[bool], bool] = bool) -> bool:
        """Whether the step that has not been looked at yet was good; raises an error where none may be skipped."""
        step, self.unseen = self.unseen, None
        if step is None or agreed(all(map(isfinite, figures := step.figures()))):
            return True
        if self.skipped < self.max_skipped:
            self.skipped += 1
            return False
        keys = step.keys
        named = ", ".join(keys[:NAMED]) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")
        raise UserError(
            f"step {step.number}: loss {figures[0]:g}, norm of the gradients {figures[1]:g}. Such a step would "
            f"spoil the weights, so training has ended before it, and the last checkpoint is good. The samples were: "
            f"{named or 'not named'}. Resume (`ckpt_path` last) with a lower learning rate, or with clipped gradients "
            "(`gradient_clip_val`), or add a callback FiniteGuard whose `max_skipped` allows to skip such steps."
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look()

    on_train_end = on_validation_start

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that are not finite: an optimizer can make some of finite gradients."""
        for part in ("state_dict", "current_model_state"):
            weights = {name: one for name, one in checkpoint.get(part, {}).items() if isinstance(one, Tensor)}
            good = torch.stack([one.isfinite().all() for one in weights.values()]).tolist() if weights else []
            spoilt = [name for name, fine in zip(weights, good, strict=True) if not fine]
            if spoilt:
                raise UserError(
                    f"step {trainer.global_step}: {len(spoilt)} weights are not finite, such as {spoilt[0]}, so they "
                    "are not saved, and the last checkpoint is good. Resume from it with a lower learning rate."
                )

    def state_dict(self) -> dict[str, Any]:
        """The count, before which the last step must be known."""
        self._look()
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = self.logged = state_dict["skipped"]


class _Step:
    """An optimizer step whose loss and norm of the gradients are on their way from the device."""

    def __init__(self, number: int, keys: list[str], figures: Tensor) -> None:
        self.number, self.keys, self.there = number, keys, figures
        if figures.device.type == "cuda":
            self.there = torch.empty_like(figures, device="cpu", pin_memory=True)
            self.there.copy_(figures, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def figures(self) -> list[float]:
        """The two; a GPU has much to do still where they are asked for a step later."""
        if hasattr(self, "event"):
            self.event.synchronize()
        return cast(list[float], self.there.tolist())


def _leaves_out(optimizer: Optimizer, trainer: Trainer) -> bool:
    """Whether an optimizer takes no step where it is told so on the device: all parts of a fused Adam, if complete."""
    if scales_gradients(trainer) or isinstance(trainer.precision_plugin, DeepSpeedPrecision | FSDPPrecision):
        return False
    return isinstance(optimizer, Adam) and all(group["fused"] for group in optimizer.param_groups)


def trained(optimizer: Optimizer) -> list[Parameter]:
    """The parameters of an optimizer, of all its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def total_norm(optimizer: Optimizer) -> Tensor:
    """The norm of all gradients, as one vector."""
    return get_total_norm([one.grad for one in trained(optimizer) if one.grad is not None])


def scales_gradients(trainer: Trainer) -> bool:
    """Whether losses are scaled, as fp16 needs, by a scaler that skips steps whose gradients are infinite."""
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None
