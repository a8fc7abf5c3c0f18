"""A UNet and a ControlNet without what diffusers computes in vain give what diffusers' own give."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from featinv_pl.nets.spared import spare_kernels

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
BLOCKS = {
    "of a prompt": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
    "without a prompt": ("AttnDownBlock2D", "AttnUpBlock2D"),
}


class Kernels(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += not func.is_view
        return func(*args, **(kwargs or {}))


def step(unet: Any, control: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """Prediction, gradients by the names of diffusers, and how many kernels they took."""
    torch.manual_seed(0)
    latents, prompts, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.tensor([10, 900])
    with Kernels() as kernels:
        down, middle = control(latents, timesteps, prompts, torch.randn(2, 32, 8, 8), 1.0, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        prediction = unet(latents, timesteps, prompts, **residuals, return_dict=False)[0]
        prediction.square().mean().backward()
    gradients = deepcopy(control)
    for named, weight in zip(gradients.parameters(), control.parameters(), strict=True):
        named.data = weight.grad
    return prediction.detach(), gradients.state_dict(), kernels.found


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_the_same_is_computed_by_fewer_kernels(blocks: str, linear: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    down, up = BLOCKS[blocks]
    types = {"down_block_types": (down, "DownBlock2D"), "up_block_types": ("UpBlock2D", up)}
    unet = UNet2DConditionModel(**SMALL, **types, use_linear_projection=linear).requires_grad_(False)
    control = ControlNetModel.from_unet(unet)
    control.controlnet_cond_embedding = torch.nn.Identity()
    for weight in control.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    plain = step(unet, control)
    spared = deepcopy(unet), deepcopy(control)
    for network in spared:
        spare_kernels(network)
    assert not any(one.requires_grad for one in spared[0].parameters())
    prediction, gradients, kernels = step(*spared)
    torch.testing.assert_close(prediction, plain[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients, plain[1], rtol=1e-3, atol=1e-6)
    assert kernels < 0.95 * plain[2]

    # What is saved is diffusers', and back.
    spared[0].save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again.state_dict(), unet.state_dict(), rtol=0, atol=0)
    fresh = deepcopy(spared[1])
    for weight in fresh.parameters():
        torch.nn.init.zeros_(weight)
    fresh.load_state_dict(control.state_dict())
    torch.testing.assert_close(step(spared[0], fresh)[0], prediction)
