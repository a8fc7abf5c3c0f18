"""Sampling: from noise to latents, by any denoiser."""

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.sampling.guidance import Denoiser
from featinv_pl.sampling.sampler import Sampler

SCHEDULERS = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
SPACINGS = {"ddim": "leading", "dpm": "linspace", "unipc": "linspace"}  # as diffusers, and measured in docs/better.md


def sample(denoiser: Denoiser, noise: Tensor, schedule: DDIMScheduler, sampler: Sampler) -> Tensor:
    """Sample latents from noise.

    Args:
        denoiser: Predicts noise, or velocity where the schedule says so.
        noise: (B, channels, h, w), standard normal.
        schedule: The schedule that the prior was trained with.
        sampler: Which solver, and how many steps.

    Returns:
        Latents of the shape of `noise`, scaled to unit variance.
    """
    longest = schedule.config.num_train_timesteps - 2  # with its offset, more would leave the schedule
    if sampler.steps > longest:
        raise UserError(f"`sampler.steps` must be at most {longest} for this prior, and is {sampler.steps}.")
    # A solver has state, so each call makes its own. Spacing is explicit: the prior's configuration may say anything.
    spacing = sampler.spacing or SPACINGS[sampler.scheduler]
    solver = SCHEDULERS[sampler.scheduler].from_config(schedule.config, timestep_spacing=spacing)
    solver.set_timesteps(sampler.steps, device=noise.device)
    latents: Tensor = noise * solver.init_noise_sigma
    for timestep in solver.timesteps:
        latents = solver.step(denoiser(latents, timestep), timestep, latents, return_dict=False)[0]
    return latents
