"""Sampling: from noise to latents, by any denoiser."""

from dataclasses import dataclass
from typing import Literal

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.sampling.guidance import Denoiser

SCHEDULERS = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


@dataclass(frozen=True)
class Sampler:
    """How reconstructions are drawn. The defaults are the authors'.

    Args:
        scheduler: `ddim`, `dpm` (DPM-Solver++) or `unipc`, all from diffusers.
        steps: Number of denoising steps.
        guidance_scale: 1 switches guidance off and halves the cost.
        guidance: What the unconditional branch lacks: `text` drops the prompt and keeps the map, as
            the authors do; `features` drops both, which is the pair that training has seen.
    """

    scheduler: Literal["ddim", "dpm", "unipc"] = "ddim"
    steps: int = 50
    guidance_scale: float = 1.75
    guidance: Literal["text", "features"] = "text"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--model.sampler.steps must be at least 1, and is {self.steps}.")


def sample(denoiser: Denoiser, noise: Tensor, schedule: DDIMScheduler, sampler: Sampler) -> Tensor:
    """Draw latents from noise.

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
        raise UserError(f"--model.sampler.steps must be at most {longest} for this prior, and is {sampler.steps}.")
    # A solver has state, so each call makes its own. Spacing is explicit: solvers differ in its default.
    solver = SCHEDULERS[sampler.scheduler].from_config(schedule.config, timestep_spacing="leading")
    solver.set_timesteps(sampler.steps, device=noise.device)
    latents: Tensor = noise * solver.init_noise_sigma
    for timestep in solver.timesteps:
        latents = solver.step(denoiser(latents, timestep), timestep, latents, return_dict=False)[0]
    return latents
