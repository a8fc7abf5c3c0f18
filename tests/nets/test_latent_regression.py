"""A regression learns what maps say of latents, on grids of any ratio."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, mse_loss

from featinv_pl.nets.regression import LatentRegression, fit

STEPS = 40


def data(size: tuple[int, int], grid: tuple[int, int], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Maps whose channels differ in scale, and latents that a fixed function gives of them, but for noise."""
    rng, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    maps = torch.randn(count, 6, *size, generator=rng)
    latents = conv2d(maps.relu(), 0.3 * torch.randn(4, 6, 3, 3, generator=fixed), padding=1)
    latents = interpolate(latents, grid, mode="bilinear")
    return maps * torch.logspace(-2, 2, 6).view(6, 1, 1) + 3, latents + 0.1 * torch.randn(latents.shape, generator=rng)


@pytest.mark.parametrize(("size", "grid"), [((3, 2), (6, 4)), ((6, 6), (4, 4))])
def test_latents_are_learned(size: tuple[int, int], grid: tuple[int, int]) -> None:
    network = LatentRegression((6, *size), (4, *grid))
    error = fit(network, (data(size, grid, 16, step) for step in range(STEPS)), STEPS)
    maps, latents = data(size, grid, 100, STEPS)
    with torch.no_grad():
        assert network(maps[:1]).shape == (1, 4, *grid)
        assert mse_loss(network(maps), latents) == pytest.approx(error, rel=0.5)
        assert mse_loss(network(maps), latents) < 0.3 * latents.square().mean()
    assert not fit(network, [(maps, latents * torch.nan)], 2) < torch.inf  # an error that is not finite shows


def test_latents_are_learned_in_half_precision() -> None:
    """Weights that a context casts are cast anew at each step."""
    size, grid = (3, 2), (6, 4)
    network = LatentRegression((6, *size), (4, *grid))
    halves = partial(torch.autocast, "cpu", torch.bfloat16)
    error = fit(network, (data(size, grid, 16, step) for step in range(STEPS)), STEPS, halves)
    maps, latents = data(size, grid, 100, STEPS)
    with torch.no_grad():
        assert mse_loss(network(maps), latents) == pytest.approx(error, rel=0.5)
        assert mse_loss(network(maps), latents) < 0.3 * latents.square().mean()
