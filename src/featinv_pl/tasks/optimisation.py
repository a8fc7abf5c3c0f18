"""How the LightningModules are optimised: optimizer, learning rate schedule and clipping."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision
from torch import Tensor, distributed
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from featinv_pl.errors import UserError
from featinv_pl.runtime.finite import scales_gradients, total_norm, trained
from featinv_pl.runtime.internals import logs_step
from featinv_pl.runtime.ranks import mean_of_ranks


class Optimised(LightningModule):
    """A module that is optimised as configured, and whose gradients are clipped with fused optimizers too.

    Lightning refuses to clip for fused optimizers in any mixed precision, but only fp16 scales gradients, and it would
    compute the norm that `FiniteGuard` has computed a second time.

    Args:
        optimizer: Factory of the optimizer.
        lr_scheduler: Factory of a learning rate schedule, advanced every step.
    """

    gradient_norm: Tensor | None = None
    """Norm of the gradients of the step at hand, left here by `FiniteGuard`."""

    def __init__(self, optimizer: OptimizerCallable = AdamW, lr_scheduler: LRSchedulerCallable | None = None) -> None:
        super().__init__()
        self.optimizer_factory, self.lr_scheduler_factory = _plain(optimizer), _plain(lr_scheduler)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory([one for one in self.parameters() if one.requires_grad])
        if self.lr_scheduler_factory is None:
            return optimizer
        scheduler = self.lr_scheduler_factory(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise UserError(
                "`lr_scheduler`: ReduceLROnPlateau waits for a metric, and schedules advance with every step here. "
                "Use another, such as torch.optim.lr_scheduler.OneCycleLR, and EarlyStopping for the end."
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_moments(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with an optimizer of other weights."""
        groups = [group for state in checkpoint.get("optimizer_states", []) for group in state.get("param_groups", [])]
        saved, own = sum(len(group["params"]) for group in groups), sum(one.requires_grad for one in self.parameters())
        if groups and saved != own:
            raise UserError(
                f"`ckpt_path`: the optimizer in this checkpoint has {saved} weights, and this run trains {own}: it is "
                "of an earlier version, or of a run with other options. Its weights can be tested and exported; to "
                "train them further, give the exported folder as `adapt.control`."
            )

    def log_step(self, figures: dict[str, Tensor]) -> None:
        """Log figures of a training step, in loggers as means over ranks, each of which has as many samples.

        One collective at the steps that loggers see. A progress bar of Lightning's would wait for every step.
        """
        if distributed.is_initialized() and logs_step(self.trainer):
            means = mean_of_ranks(torch.stack([one.detach().float() for one in figures.values()]))
            figures = dict(zip(figures, means, strict=True))
        for name, value in figures.items():
            self.log(f"train/{name}", value)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of a step, after those of all its batches and ranks are summed."""
        norm, self.gradient_norm = self.gradient_norm, None
        if not gradient_clip_val:
            return
        if isinstance(self.trainer.precision_plugin, DeepSpeedPrecision | FSDPPrecision):  # a rank has only a part
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        if not gradient_clip_val > 0:
            raise UserError(f"`gradient_clip_val` must be at least 0, and is {gradient_clip_val}.")
        if scales_gradients(self.trainer) and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UserError(
                f"`gradient_clip_val`: in 16-mixed a fused {type(optimizer).__name__} unscales gradients only within "
                "its step, so they cannot be clipped before it. Set `precision` to bf16-mixed, or leave out `fused`."
            )
        if gradient_clip_algorithm == "value":
            clip_grad_value_(trained(optimizer), gradient_clip_val)
        else:
            norm = total_norm(optimizer) if norm is None else norm
            clip_grads_with_norm_(trained(optimizer), gradient_clip_val, norm)


def _plain(factory: Any) -> Any:
    """A factory that the command line has made, without the rest of that: it can be copied and pickled then."""
    if isinstance(factory, partial) and factory.args and isinstance(made := factory.args[-1], type):
        return partial(made, **factory.keywords)
    return factory
