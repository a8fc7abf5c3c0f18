"""The feature encoder, whose first convolution is computed in another order."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from featinv_pl.nets.control import FeatureEncoder


@pytest.mark.parametrize(
    ("features", "size", "cheaper"),
    [
        ((512, 4, 4), (16, 16), True),
        ((512, 3, 5), (13, 9), True),  # odd, and of another shape
        ((512, 1, 1), (5, 4), True),
        ((64, 4, 4), (4, 8), True),
        ((16, 9, 9), (4, 6), False),  # smaller than the map
    ],
)
def test_the_encoder_convolves_upsampled_maps(
    features: tuple[int, int, int], size: tuple[int, int], cheaper: bool
) -> None:
    """At the borders, too, and with the same gradients; most of the products are left out where that pays."""
    torch.manual_seed(0)
    encoder = FeatureEncoder(features[0], 8, hidden_channels=6, num_layers=2).double()
    assert {name: tuple(one.shape) for name, one in encoder.state_dict().items()} == {
        "layers.0.weight": (6, features[0], 3, 3),
        "layers.0.bias": (6,),
        "layers.2.weight": (8, 6, 3, 3),
        "layers.2.bias": (8,),
    }
    torch.nn.init.normal_(encoder.layers[-1].weight)
    maps = torch.randn(2, *features, dtype=torch.float64, requires_grad=True)
    upsampled = functional.interpolate(maps, size, mode="bilinear", align_corners=False)

    def computed(function: object) -> tuple[list[torch.Tensor], int]:
        with FlopCounterMode(display=False) as counter:
            result = function()  # type: ignore[operator]
            result.square().mean().backward(retain_graph=True)
        found = [result.detach(), maps.grad, *(one.grad for one in encoder.parameters())]
        maps.grad = None
        encoder.zero_grad()
        return found, counter.get_total_flops()

    (plain, most), (got, fewer) = computed(lambda: encoder.layers(upsampled)), computed(lambda: encoder(maps, size))
    for one, other in zip(got, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert (fewer < most) == cheaper
    single = encoder.float()(maps.float(), size)
    assert (single - plain[0]).abs().max() < 1e-6 * plain[0].abs().max()
