"""Frozen networks stay frozen, and a digest is of what they compute with."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from featinv_pl.nets.frozen import Frozen, digest, keep_products_in


class Wobbly(Frozen):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.freeze()


def test_stays_frozen_inside_a_training_parent() -> None:
    frozen = Wobbly()
    parent = nn.Sequential(frozen, nn.Dropout(0.5))
    inputs = torch.randn(8, 4)
    before = frozen.layers(inputs)
    parent.train()
    frozen.train()
    assert parent[1].training
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(frozen.layers(inputs), before)
    torch.testing.assert_close(frozen.layers[1].running_mean, torch.zeros(4), rtol=0, atol=0)
    copied = copy.deepcopy(parent)
    assert copied[0] is frozen
    assert copied[1] is not parent[1]


@pytest.mark.parametrize("changed", [None, "weight", "buffer", "name", "shape"])
def test_digest_sees_a_change_but_not_mode_and_storage(changed: str | None) -> None:
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)).half()
    before = digest(network)
    network = network.float().eval().requires_grad_(False)
    if changed == "weight":
        network.get_parameter("0.weight").data[0, 0] += 1e-6
    elif changed == "buffer":
        network.get_buffer("1.running_mean")[0] += 1e-6
    elif changed == "name":
        network = nn.Sequential(OrderedDict(zip("ab", network.children(), strict=True)))
    elif changed == "shape":
        weight = network.get_parameter("0.weight")
        weight.data = weight.data.view(3, 4)
    assert (digest(network) == before) is (changed is None)
    assert len(before) == 64


def test_products_keep_the_results_of_mixed_precision() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(32, 4))
    images = torch.randn(2, 3, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = network(images)
        keep_products_in(network, torch.bfloat16)
        assert torch.equal(network(images), before)
    kept = {name: weight.dtype for name, weight in network.named_parameters()}
    assert kept["0.weight"] == kept["4.bias"] == torch.bfloat16
    assert kept["1.weight"] == torch.float32
