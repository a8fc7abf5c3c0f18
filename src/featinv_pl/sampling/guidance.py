"""Guidance: functions that wrap a denoiser."""

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(latents (B, channels, h, w), scalar timestep) -> prediction of the same shape as the latents."""


def classifier_free(denoiser: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, in the form of Stable Diffusion).

    Args:
        denoiser: Takes a doubled batch: the first half unconditional, the second conditional, so
            that both branches cost one call.
        scale: 1 is the conditional branch alone.
    """

    def guided(latents: Tensor, timestep: Tensor) -> Tensor:
        unconditional, conditional = denoiser(torch.cat([latents, latents]), timestep).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guided
