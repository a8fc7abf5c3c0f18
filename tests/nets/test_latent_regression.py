"""Regressions learn what maps say of latents, on grids of any ratio."""

from functools import partial

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, mse_loss

from featinv_pl.errors import UserError
from featinv_pl.nets import regression
from featinv_pl.nets.regression import HELD_OUT, PENALTIES, LatentRegression, RidgeRegression, fit, fit_ridge

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


def linear(count: int) -> tuple[Tensor, Tensor]:
    """Maps of 36 values, of which one is always the same, and latents that are linear in the others, but for noise."""
    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(count, 6, 3, 2, generator=rng) * torch.logspace(-2, 2, 6).view(6, 1, 1) + 3
    maps[:, 0, 0, 0] = 7
    latents = maps.flatten(1) @ torch.randn(36, 96, generator=rng) + 2
    return maps, (latents + 100 * torch.randn(count, 96, generator=rng)).view(count, 4, 6, 4)


def test_a_ridge_is_that_of_scikit_learn() -> None:
    """With the penalty that errs least on every tenth image, and fitted again to all of them."""
    maps, latents = linear(95)
    network = RidgeRegression((6, 3, 2), (4, 6, 4))
    error = fit_ridge(network, zip(maps.split(16), latents.split(16), strict=True))
    x, y, rows = maps.flatten(1).double().numpy(), latents.flatten(1).double().numpy(), torch.arange(95).numpy()
    fitted, held_out = rows % HELD_OUT != 0, rows % HELD_OUT == 0
    errors = {}
    for penalty in PENALTIES:
        model = make_pipeline(StandardScaler(), Ridge(penalty * fitted.sum())).fit(x[fitted], y[fitted])
        errors[penalty] = ((model.predict(x[held_out]) - y[held_out]) ** 2).mean()
    best = min(errors, key=errors.__getitem__)
    assert best not in PENALTIES[:: len(PENALTIES) - 1]  # neither the least nor the greatest
    assert error == pytest.approx(errors[best], rel=1e-4)
    expected = make_pipeline(StandardScaler(), Ridge(best * len(x))).fit(x, y).predict(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which would cost digits
        predicted = network(maps).flatten(1)
    torch.testing.assert_close(predicted.double(), torch.from_numpy(expected), rtol=1e-3, atol=0.05)


def test_a_ridge_of_large_maps_reads_coarser_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "VALUES", 30)
    network = RidgeRegression((6, 3, 2), (4, 6, 4))
    assert network.linear.in_features == 6 * 2 * 2
    maps = torch.randn(5, 6, 3, 2)
    torch.testing.assert_close(network.read(maps)[:, :4], interpolate(maps, (2, 2), mode="area")[:, 0].flatten(1))
    monkeypatch.setattr(regression, "VALUES", 1)
    assert RidgeRegression((6, 3, 2), (4, 6, 4)).linear.in_features == 6


def test_a_ridge_needs_images_and_finite_maps() -> None:
    maps, latents = linear(20)
    network = RidgeRegression((6, 3, 2), (4, 6, 4))
    with pytest.raises(UserError, match="10 images are too few: at least 11 are needed"):
        fit_ridge(network, [(maps[:10], latents[:10])])
    assert not fit_ridge(network, [(maps, latents), (maps * torch.nan, latents)]) < torch.inf
    assert not fit_ridge(network, [(maps, latents * torch.nan)]) < torch.inf
