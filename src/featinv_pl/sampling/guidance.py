"""Guidance: functions that wrap a denoiser."""

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(latents (B, channels, h, w), scalar timestep) -> prediction of the same shape as the latents."""


def weighted(branches: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, in the form of Stable Diffusion).

    Args:
        branches: Takes a batch repeated twice, so that both branches cost one call: first the unconditional
            branch, then the conditional one.
        scale: s in (1 - s) unconditional + s conditional; 1 disables guidance.
    """

    def guided(latents: Tensor, timestep: Tensor) -> Tensor:
        unconditional, conditional = branches(torch.cat([latents, latents]), timestep).chunk(2)
        return (1 - scale) * unconditional + scale * conditional

    return guided


def within(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """Guidance in a limited interval of timesteps (Kynkäänniemi et al., arXiv 2404.07724).

    Args:
        guided: The denoiser from `low` to `high`.
        plain: The denoiser elsewhere.
        low: The first timestep of the interval.
        high: The last.
    """

    def limited(latents: Tensor, timestep: Tensor) -> Tensor:
        return (guided if low <= timestep <= high else plain)(latents, timestep)

    return limited
