"""What training holds on a GPU, counted without one: tensors that have a device and a shape, but no values.

Autocast on CUDA keeps what goes into a norm and what comes out of it in fp32, which it does not on a CPU, wherever a
network leaves that to autocast.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.pretended import autocast, flash, to_gpu
from featinv_pl.nets.control import Encoder, FeatureControl
from featinv_pl.nets.frozen import keep_products_in
from featinv_pl.nets.precision import call_again, call_throughout
from featinv_pl.nets.spared import spare_kernels
from featinv_pl.tasks.inversion import FeatureInversion


@dataclass(frozen=True)
class Shapes:
    """What decides how much a training step holds.

    Attributes:
        unet: The configuration of the prior's UNet.
        hidden_channels: Of the feature encoder.
        features: (C, h, w) of a feature map.
        latents: (channels, h, w) of an image.
        prompt: (L, D).
    """

    unet: dict[str, Any]
    hidden_channels: int
    features: tuple[int, ...]
    latents: tuple[int, ...]
    prompt: tuple[int, ...]

    @classmethod
    def of(cls, model: FeatureInversion) -> Self:
        """Those of a model."""
        prior, width = model.inverter.prior, model.inverter.control.encoder.config.hidden_channels
        latents, prompt = prior.latent_grid(model.inverter.image_size), tuple(prior.prompt.shape[-2:])
        return cls(dict(prior.unet.config), width, model.inverter.classifier.feature_shape, latents, prompt)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it and still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: int = 0
        self.known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known[storage._cdata] = storage
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        return made

    def _free(self, size: int) -> None:
        self.bytes -= size


def activations(shapes: Shapes, mixed: bool, again: bool) -> int:
    """Bytes that a step holds for each sample at the end of its forward pass.

    Args:
        shapes: Of the model.
        mixed: Whether it is in bf16-mixed precision, or in fp32.
        again: Whether activations are computed again in the backward pass, one block's at a time, which comes on top.
    """
    return _held(shapes, 2, mixed, again) - _held(
        shapes, 1, mixed, again
    )  # all else are weights, and copies of them in bf16


def _held(shapes: Shapes, batch_size: int, mixed: bool, again: bool) -> int:
    unet, control = _networks(shapes, mixed, again)
    fused = patch.object(functional, "scaled_dot_product_attention", flash)  # which no GPU does in parts
    live = Live()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), live, fused:
        for network in (unet, control):
            to_gpu(network)
        latents, prompts, maps = (
            torch.randn(batch_size, *shape) for shape in (shapes.latents, shapes.prompt, shapes.features)
        )
        timesteps = torch.zeros(batch_size)
        with autocast() if mixed else nullcontext():
            residuals = control(latents, timesteps, prompts, control.encoder(maps, shapes.latents[1:]))
            down, middle = residuals
            prediction = call_throughout(
                unet,
                latents,
                timesteps,
                prompts,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        _loss = functional.mse_loss(prediction.float(), latents)  # holds what the backward pass needs
        del residuals, down, middle, prediction
        return live.bytes


def _networks(shapes: Shapes, mixed: bool, again: bool) -> tuple[UNet2DConditionModel, FeatureControl]:
    """The UNet and the control without weights, prepared for training as a FeatureInversion prepares them."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(shapes.unet)
        control = FeatureControl(unet, shapes.features[0], Encoder(shapes.hidden_channels))
    spare_kernels(unet)
    unet.requires_grad_(False).eval()
    if mixed:
        keep_products_in(unet, torch.bfloat16)
    if again:
        unet.enable_gradient_checkpointing(call_again)
        control.controlnet.enable_gradient_checkpointing(call_again)
    return unet, control
