"""UNet and ControlNet in half precision throughout, with trained weights in single precision."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

TOGETHER = 16  # weights that are copied by one kernel; their gradients are there at the same time, for DDP to sum


def call_throughout(network: nn.Module, latents: Tensor, timesteps: Tensor, prompts: Tensor, **given: Any) -> Any:
    """Call a UNet or a ControlNet of diffusers: within autocast, in its dtype throughout.

    On a GPU, autocast itself would run norms in single precision, with a conversion before and after each, and convert
    each weight by a kernel of its own. Gradients reach the weights in single precision, as with autocast.
    """
    device = latents.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return network(latents, timesteps, prompts, **given)
    dtype = torch.get_autocast_dtype(device)
    weights, inputs = _copies(network, dtype), (latents.to(dtype), timesteps, prompts.to(dtype))
    with torch.autocast(device, enabled=False):
        return functional_call(network, weights, inputs, given, tie_weights=False)


def call_again(module: nn.Module, *given: Any) -> Any:
    """Call a part of such a network, whose activations are computed again in the backward pass: by the same weights."""
    return checkpoint(functional_call, module, dict(module.named_parameters()), given, use_reentrant=False)


def _copies(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a network by name; none where they are in this dtype."""
    if next(network.parameters()).dtype == dtype:
        return {}
    names, weights = zip(*network.named_parameters(), strict=True)
    parts = (weights[start : start + TOGETHER] for start in range(0, len(weights), TOGETHER))
    copies = (copy for part in parts for copy in _Copied.apply(dtype, *part))
    return dict(zip(names, copies, strict=True))


class _Copied(Function):
    """Copies of tensors in another dtype, made by one kernel; so are their gradients in the dtype of the originals."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        return _copied(weights, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        made = iter(_copied([one for one in gradients if one is not None], ctx.dtype))
        return None, *(None if one is None else next(made) for one in gradients)


def _copied(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    made = [torch.empty_like(one, dtype=dtype) for one in tensors]
    if made:
        torch._foreach_copy_(made, list(tensors))
    return tuple(made)
