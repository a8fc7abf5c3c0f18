"""UNet and ControlNet in half precision, with trained weights in single precision."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from featinv_pl.nets.control import Encoder, FeatureControl
from featinv_pl.nets.frozen import keep_products_in
from featinv_pl.nets.precision import call_again
from featinv_pl.nets.prior import Prior

BF16 = torch.bfloat16


class Conversions(TorchDispatchMode):
    """Counts tensors that are brought to another dtype one by one, and those that norms read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.found["converted"] += name == "aten::_to_copy"
        if name in ("aten::native_group_norm", "aten::native_layer_norm"):
            self.found[args[0].dtype, args[1 + ("layer" in name)].dtype] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def parts(prior_folder: Path) -> tuple[Prior, FeatureControl]:
    torch.manual_seed(0)
    prior = Prior(str(prior_folder))
    control = FeatureControl(prior.unet, 8, Encoder(8))
    zero = (*control.controlnet.controlnet_down_blocks, control.controlnet.controlnet_mid_block)
    for layer in (*zero, control.encoder.layers[-1]):
        torch.nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    return prior, control


def step(prior: Prior, control: FeatureControl) -> tuple[Tensor, Tensor, Counter[Any]]:
    """Prediction, gradients and conversions of the ControlNet and the UNet."""
    torch.manual_seed(1)
    latents, maps, timesteps = torch.randn(4, 4, 4, 4), torch.randn(4, 8, 4, 4), torch.tensor([3, 400, 401, 999])
    prompts = prior.prompt.expand(4, -1, -1)
    encoded = control.encoder(maps, (4, 4))
    with Conversions() as conversions:
        prediction = prior.predict(latents, timesteps, prompts, control(latents, timesteps, prompts, encoded))
        prediction.square().mean().backward()
    weights = dict(control.named_parameters())
    gradients = [one.grad for one in weights.values() if one.grad is not None]
    assert len(gradients) == len(weights)
    assert {one.dtype for one in gradients} == {torch.float32} == {one.dtype for one in weights.values()}
    control.zero_grad()
    return prediction.detach(), torch.cat([one.flatten() for one in gradients]), conversions.found


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("kept", [False, True])
def test_autocast_reaches_norms_and_converts_weights_together(parts: tuple[Prior, FeatureControl], kept: bool) -> None:
    prior, control = parts
    exact, gradients, _ = step(prior, control)
    if kept:
        keep_products_in(prior, BF16)
        assert {one.dtype for one in prior.unet.parameters()} == {BF16}
    with torch.autocast("cpu", BF16, cache_enabled=False):
        prediction, found, conversions = step(prior, control)
    assert prediction.dtype == torch.float32
    assert error(prediction, exact) < 1.2e-2
    assert error(found, gradients) < 3.1e-2
    assert conversions.pop("converted") < 20  # inputs and outputs, and the encoder's gradients
    assert conversions.keys() == {(BF16, BF16)}


def test_activations_are_computed_again_by_the_same_weights(parts: tuple[Prior, FeatureControl]) -> None:
    prior, control = parts
    with torch.autocast("cpu", BF16):
        prediction, gradients, before = step(prior, control)
        for network in (prior.unet, control.controlnet):
            network.enable_gradient_checkpointing(call_again)
            network.train()
        again, same, after = step(prior, control)
    assert torch.equal(prediction, again)
    assert torch.equal(gradients, same)
    assert after[BF16, BF16] > before[BF16, BF16]
