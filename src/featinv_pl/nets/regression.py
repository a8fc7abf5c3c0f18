"""A regression of latents on feature maps: what inverting by the mean gives, without any diffusion."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

LEARNING_RATE, WEIGHT_DECAY, LONGEST_GRADIENT = 2e-3, 0.01, 1.0


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
