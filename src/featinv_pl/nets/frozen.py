"""Networks that never train."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn


class Frozen(nn.Module):
    """A network whose weights never change: no gradients, always in eval mode."""

    def freeze(self) -> Self:
        """Switch gradients off. Call once, at the end of the constructor."""
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever Lightning or a parent module asks for."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Be shared by copies of a parent, such as a moving average of what trains beside."""
        return self


def keep_products_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep weights in autocast's `dtype` that it would convert at every use; the module must not train.

    Results are the same, with half the memory.
    """
    for weight in products(module):
        weight.data = weight.data.to(dtype)


def products(module: nn.Module) -> Iterator[nn.Parameter]:
    """Weights that autocast's dtype is enough for: of linear layers and convolutions, all of UNet and ControlNet."""
    for part in module.modules():
        if isinstance(part, (UNet2DConditionModel, ControlNetModel)):  # see `nets.precision`
            yield from part.parameters()
        elif isinstance(part, (nn.Linear, nn.Conv2d)):
            yield from part.parameters(recurse=False)


def digest(module: nn.Module) -> str:
    """Hexadecimal SHA-256 of a module's names, shapes and values, independent of dtype in storage."""
    return weights_digest(module.state_dict())


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The digest of the module with this state dict."""
    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()
