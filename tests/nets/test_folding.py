"""Batch norms of a frozen classifier, folded for extraction."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from featinv_pl.nets.folding import fold_norms


class Small(nn.Module):
    """A convolution and its norm, beside which something else may read the convolution's output."""

    def __init__(self, reads_both: bool = False, twice: bool = False, flat: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.reads_both, self.twice, self.flat = reads_both, twice, flat

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.conv(images)
        normed: Tensor = self.norm(made)
        if self.twice:
            normed = normed + self.conv(images.flip(3))
        if self.flat:
            normed = normed.view(len(normed), -1)  # which channels last does not have
        return normed + made if self.reads_both else normed


def randomised(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            values: Any
            for values in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(values, 0.5, 2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_a_folded_network_computes_the_same_with_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = randomised(timm.create_model(name, num_classes=10))
    images, other = torch.randn(2, 2, 3, 64, 64)
    expected = model(other)
    with torch.inference_mode():
        folded = fold_norms(model, lambda: [model(images)])
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert folded > 10
    assert not norms
    torch.testing.assert_close(model(other), expected, rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(model(other.requires_grad_()).sum(), other)[0]  # as an attack takes it
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("how", ["reads_both", "twice", "flat"])
def test_what_cannot_be_folded_is_left_as_it_was(how: str) -> None:
    torch.manual_seed(0)
    model, images = randomised(Small(**{how: True})), torch.randn(2, 3, 8, 8)
    expected, before = model(images), model.state_dict()
    assert fold_norms(model, lambda: [model(images)]) == 0
    assert torch.equal(model(images), expected)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    usual = randomised(Small())
    assert fold_norms(usual, lambda: [usual(images)]) == 1


def test_a_network_without_batch_norms_is_not_touched() -> None:
    model = timm.create_model("test_convnext", num_classes=10).eval()
    assert fold_norms(model, lambda: [model(torch.zeros(1, 3, 64, 64))]) == 0
    assert all(weight.is_contiguous() for weight in model.parameters())
