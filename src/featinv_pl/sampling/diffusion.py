"""The algebra of a noise schedule: between clean latents, noisy latents and what a prior predicts of them.

With `a` the schedule's cumulative product at a timestep, noisy latents are sqrt(a) clean + sqrt(1 - a) noise, and
the velocity is sqrt(a) noise - sqrt(1 - a) clean (Salimans and Ho, arXiv 2202.00512). A schedule says in its
`prediction_type` which of noise and velocity its prior predicts.

Latents, noise and predictions are (B, channels, h, w); timesteps are (B,); a single one may also be an integer.
"""

from diffusers import DDIMScheduler
from torch import Tensor


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


def min_snr_weights(schedule: DDIMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of a denoiser's squared errors that keep easy timesteps from ruling (Hang et al., arXiv 2303.09556).

    min(SNR, gamma) / SNR where noise is predicted, min(SNR, gamma) / (SNR + 1) where velocity is; the paper's gamma
    is 5.
    """
    alphas: Tensor = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    ratio = alphas / (1 - alphas)
    return ratio.clamp(max=gamma) / (ratio + 1 if _predicts_velocity(schedule) else ratio)


def _predicts_velocity(schedule: DDIMScheduler) -> bool:
    return bool(schedule.config.prediction_type == "v_prediction")


def _rates(schedule: DDIMScheduler, latents: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor]:
    """How much clean signal and how much noise there is, shaped to multiply latents."""
    if isinstance(timesteps, int):  # a scalar on the CPU serves latents on any device
        alphas = schedule.alphas_cumprod[timesteps]
    else:
        alphas = schedule.alphas_cumprod.to(latents)[timesteps].reshape(-1, *[1] * (latents.ndim - 1))
    return alphas.sqrt(), (1 - alphas).sqrt()
