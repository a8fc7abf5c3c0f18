"""Regressions of latents on feature maps: what inverting by the mean gives, without any diffusion."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from math import ceil, nan, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from featinv_pl.errors import UserError

LEARNING_RATE, WEIGHT_DECAY, LONGEST_GRADIENT = 2e-3, 0.01, 1.0
VALUES = 8192  # of a map that a ridge reads: the matrix of their products has 512 MB
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # in variances of each value of the map
HELD_OUT = 10  # one image in ten chooses the penalty


class LatentRegression(nn.Module):
    """A few convolutions from feature maps of a shape (C, h, w) to latents (channels, H / f, W / f)."""

    def __init__(self, feature_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        (channels, *size), (outputs, *grid) = feature_shape, latent_shape
        width = max(128, channels // 4)
        finer = max(ceil(latents / places) for latents, places in zip(grid, size, strict=True))
        self.grid = grid
        self.standardise = nn.BatchNorm2d(channels, affine=False, momentum=None)
        self.read = nn.Conv2d(channels, width, 3, padding=1)
        self.before = nn.Conv2d(width, width, 3, padding=1)
        self.refine = nn.Sequential(nn.Conv2d(width, width * finer**2, 1), nn.PixelShuffle(finer))
        self.after = nn.Conv2d(width, width, 3, padding=1)
        self.write = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Expected latents (B, channels, H / f, W / f) of maps (B, C, h, w)."""
        hidden = functional.silu(self.read(self.standardise(features)))
        hidden = hidden + functional.silu(self.before(hidden))
        hidden = functional.interpolate(self.refine(hidden), self.grid, mode="bilinear")
        hidden = hidden + functional.silu(self.after(hidden))
        latents: Tensor = self.write(hidden)
        return latents


class RidgeRegression(nn.Module):
    """A linear function from feature maps of a shape (C, h, w) to latents (channels, H / f, W / f).

    A map of more than `VALUES` values is averaged over a coarser grid.
    """

    def __init__(self, feature_shape: tuple[int, ...], latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        (channels, *size), self.latent_shape = feature_shape, latent_shape
        height, width = size
        grids = [(min(side, height), min(side, width)) for side in range(max(size), 0, -1)]
        self.grid = next((grid for grid in grids if channels * prod(grid) <= VALUES), (1, 1))
        self.linear = nn.Linear(channels * prod(self.grid), prod(latent_shape))

    def read(self, features: Tensor) -> Tensor:
        """The values (B, D) that are regressed on, of maps (B, C, h, w)."""
        return functional.adaptive_avg_pool2d(features.float(), self.grid).flatten(1)

    def forward(self, features: Tensor) -> Tensor:
        """Expected latents (B, channels, H / f, W / f) of maps (B, C, h, w), in single precision."""
        with torch.autocast(features.device.type, enabled=False):
            latents: Tensor = self.linear(self.read(features)).unflatten(1, self.latent_shape)
        return latents


def fit_ridge(network: RidgeRegression, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Minimise the squared error of pairs of maps and latents, and a penalty of the weights' squares, in closed form.

    The penalty is the one of `PENALTIES` with which a fit to nine images in ten errs least on the others; all of them
    are used then. Returns that mean squared error, which is NaN where a map or latents are not finite.

    Raises:
        UserError: There are too few images.
    """
    parts = _Moments(network), _Moments(network)
    for features, latents in batches:
        x, y = network.read(features).cpu(), latents.flatten(1).float().cpu()
        places = torch.arange(len(x)) + parts[0].count + parts[1].count
        for part, rows in zip(parts, (places % HELD_OUT != 0, places % HELD_OUT == 0), strict=True):
            part.add(x[rows], y[rows])
    kept, held_out = parts
    if held_out.count < 2:
        raise UserError(f"{kept.count + held_out.count} images are too few: at least {HELD_OUT + 1} are needed")
    if not (kept.xx.isfinite().all() and held_out.xx.isfinite().all()):
        return nan
    errors = [held_out.error(*kept.ridge(penalty)) for penalty in PENALTIES]
    error, penalty = min(zip(errors, PENALTIES, strict=True))
    kept.merge(held_out)
    weight, offset = kept.ridge(penalty)
    network.linear.load_state_dict({"weight": weight.float(), "bias": offset.float()})
    return error


class _Moments:
    """Sums of products of maps' values, latents and 1, from which linear regressions follow."""

    def __init__(self, network: RidgeRegression) -> None:
        inputs, outputs = network.linear.in_features, network.linear.out_features
        self.count = 0
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.double)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.double)
        self.yy = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = functional.pad(x.double(), (0, 1), value=1.0), y.double()  # single precision cancels in `ridge`
        self.count += len(x)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum().item()

    def merge(self, other: "_Moments") -> None:
        self.count, self.yy = self.count + other.count, self.yy + other.yy
        self.xx += other.xx
        self.xy += other.xy

    def ridge(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Weights (outputs, inputs) and offsets (outputs) of the least penalised squared error; offsets are free."""
        x, y = self.xx[-1, :-1] / self.count, self.xy[-1] / self.count  # means
        covariance = self.xx[:-1, :-1] / self.count - x.outer(x)
        variances = covariance.diagonal().clone()
        least = (1e-9 * variances.mean()).clamp(min=torch.finfo(torch.float).tiny)  # some values are always 0
        covariance.diagonal().add_(penalty * variances.clamp(min=least))
        weight = torch.cholesky_solve(self.xy[:-1] / self.count - x.outer(y), torch.linalg.cholesky(covariance)).T
        return weight, y - weight @ x

    def error(self, weight: Tensor, offset: Tensor) -> float:
        """Mean squared error of a linear function."""
        both = torch.cat([weight, offset[:, None]], dim=1)
        squares = ((both @ self.xx) * both).sum() - 2 * (both.T * self.xy).sum() + self.yy
        return squares.item() / (self.count * len(offset))


def fit(
    network: LatentRegression,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Minimise the mean squared error of `steps` pairs of maps and latents, and return that of the last.

    `precision` makes the context of each forward pass, such as that of a mixed precision. The network is left in eval
    mode.
    """
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    error = torch.tensor(torch.nan)
    for features, latents in batches:
        with precision():
            error = functional.mse_loss(network(features), latents)
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(network.parameters(), LONGEST_GRADIENT)
        optimizer.step()
        schedule.step()
    network.eval()
    return error.item()
