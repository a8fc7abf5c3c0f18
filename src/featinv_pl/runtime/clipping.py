"""Gradient clipping with the norm that the finite guard computes anyway."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, MixedPrecision
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from featinv_pl.errors import UserError


class Clipped(LightningModule):
    """A module whose gradients are clipped as the trainer is told, with fused optimizers too.

    Lightning refuses fused optimizers in any mixed precision, but only fp16 scales gradients, and it would compute
    the norm a second time.
    """

    gradient_norm: Tensor | None = None
    """Norm of the gradients of the step at hand, left here by a callback that has computed it."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of a step, after those of all its batches and ranks are summed.

        Raises:
            UserError: The bound is negative, or the optimizer would unscale the gradients of fp16 after they are
                clipped.
        """
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
