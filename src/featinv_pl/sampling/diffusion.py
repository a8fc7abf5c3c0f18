"""The algebra of a noise schedule: between clean latents, noisy latents and what a prior predicts of them.

With `a` the schedule's cumulative product at a timestep, noisy latents are sqrt(a) clean + sqrt(1 - a) noise, and
the velocity is sqrt(a) noise - sqrt(1 - a) clean (Salimans and Ho, arXiv 2202.00512). A schedule says in its
`prediction_type` which of noise and velocity its prior predicts.

Latents, noise and predictions are (B, channels, h, w); timesteps are (B,); a single one may also be an integer.
"""

from typing import Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor

Weighting = Literal["none", "velocity", "min-snr"]
"""How much the errors of timesteps count: see `timestep_weights`."""
MIN_SNR_GAMMA = 5.0  # the paper's


def denoising_target(schedule: DDIMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The regression target of a denoiser, noise or velocity, for clean and scaled latents."""
    if _predicts_velocity(schedule):
        velocity: Tensor = schedule.get_velocity(latents, noise, timesteps)
        return velocity
    return noise


def clean_estimate(
    schedule: DDIMScheduler, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor | int
) -> Tensor:
    """The clean latents that a prediction implies."""
    signal, noise = _rates(schedule, noisy_latents, timesteps)
    if _predicts_velocity(schedule):
        return signal * noisy_latents - noise * prediction
    return (noisy_latents - noise * prediction) / signal


def implied_prediction(
    schedule: DDIMScheduler, noisy_latents: Tensor, clean: Tensor, timesteps: Tensor | int
) -> Tensor:
    """The prediction that implies these clean latents. Inverse of `clean_estimate`."""
    signal, noise = _rates(schedule, noisy_latents, timesteps)
    if _predicts_velocity(schedule):
        return (signal * noisy_latents - clean) / noise
    return (noisy_latents - signal * clean) / noise


def timestep_weights(schedule: DDIMScheduler, timesteps: Tensor, weighting: Weighting) -> Tensor:
    """Weights (B,) of a denoiser's squared errors.

    `none` is 1. `velocity` counts an error as that of the velocity it implies, so that noisy timesteps, where a feature
    map acts, count most: the velocity's error is the noise's divided by sqrt(a). `min-snr` keeps easy timesteps from
    ruling (Hang et al., arXiv 2303.09556): min(SNR, 5) / SNR where noise is predicted, and min(SNR, 5) / (SNR + 1)
    where velocity is.
    """
    alphas: Tensor = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    velocity = _predicts_velocity(schedule)
    if weighting == "min-snr":
        ratio = alphas / (1 - alphas)
        return ratio.clamp(max=MIN_SNR_GAMMA) / (ratio + 1 if velocity else ratio)
    return 1 / alphas if weighting == "velocity" and not velocity else torch.ones_like(alphas)


def _predicts_velocity(schedule: DDIMScheduler) -> bool:
    return bool(schedule.config.prediction_type == "v_prediction")


def _rates(schedule: DDIMScheduler, latents: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor]:
    """How much clean signal and how much noise there is, shaped to multiply latents."""
    if isinstance(timesteps, int):  # a scalar on the CPU serves latents on any device
        alphas = schedule.alphas_cumprod[timesteps]
    else:
        alphas = schedule.alphas_cumprod.to(latents)[timesteps].reshape(-1, *[1] * (latents.ndim - 1))
    return alphas.sqrt(), (1 - alphas).sqrt()
