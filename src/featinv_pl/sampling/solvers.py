"""From noise to latents: solvers of any denoiser, and guidance, whose functions wrap a denoiser."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.errors import UserError
from featinv_pl.sampling.diffusion import clean_estimate, implied_prediction
from featinv_pl.sampling.sampler import Refinement, Sampler


class Step(NamedTuple):
    """A step of a solver. Its timestep is known on both sides, so that no GPU is asked for it while it computes.

    Attributes:
        number: Counted from 0.
        time: The timestep.
        timestep: The same as a scalar on the device.
    """

    number: int
    time: int
    timestep: Tensor


Denoiser = Callable[[Tensor, Step], Tensor]
"""(latents (B, channels, h, w), step) -> noise or velocity, of the shape of the latents."""

OnStep = Callable[[Step, Tensor], Tensor]
"""(step, latents after it) -> latents to go on with."""

Observer = Callable[[Tensor], Tensor]
"""Clean latents (B, channels, h, w) -> the feature maps (B, C, h', w') of their images, with gradients."""

SCHEDULERS = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
SPACINGS = {"ddim": "leading", "dpm": "linspace", "unipc": "linspace"}  # as diffusers, and measured in docs/better.md


def sample(
    denoiser: Denoiser, noise: Tensor, schedule: DDIMScheduler, sampler: Sampler, on_step: OnStep | None = None
) -> Tensor:
    """Sample latents, scaled to unit variance, from standard normal noise of their shape (B, channels, h, w).

    The schedule is the one that the prior was trained with, and says whether the denoiser predicts velocity. `on_step`
    sees the latents after each step, and may change them.
    """
    longest = schedule.config.num_train_timesteps - 2  # with its offset, more would leave the schedule
    if sampler.steps > longest:
        raise UserError(f"`sampler.steps` must be at most {longest} for this prior, and is {sampler.steps}.")
    # A solver has state, so each call makes its own. Spacing is explicit: the prior's configuration may say anything.
    spacing = sampler.spacing or SPACINGS[sampler.scheduler]
    solver = SCHEDULERS[sampler.scheduler].from_config(schedule.config, timestep_spacing=spacing)
    solver.set_timesteps(sampler.steps)  # on the CPU: the device is given them once, and not asked for any
    latents: Tensor = noise * solver.init_noise_sigma
    times, timesteps = solver.timesteps.tolist(), solver.timesteps.to(noise.device)
    for step in map(Step, range(len(times)), times, timesteps):
        latents = solver.step(denoiser(latents, step), step.time, latents, return_dict=False)[0]
        latents = on_step(step, latents) if on_step else latents
    return latents


def weighted(branches: Denoiser, scale: float, every: int = 1) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, in the form of Stable Diffusion).

    `branches` takes a batch repeated twice, so that both cost one call: first the unconditional branch, then the
    conditional one; or a batch once, for the conditional branch alone. `scale` is s in
    (1 - s) unconditional + s conditional; 1 disables guidance. Between every `every`-th step, the difference of the
    branches is that of the last one.
    """
    difference: Tensor | None = None

    def guided(latents: Tensor, step: Step) -> Tensor:
        nonlocal difference
        if difference is not None and step.number % every:
            return branches(latents, step) + (scale - 1) * difference
        unconditional, conditional = branches(torch.cat([latents, latents]), step).chunk(2)
        difference = conditional - unconditional
        return (1 - scale) * unconditional + scale * conditional

    return guided


def within(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """Guidance in a limited interval of timesteps (Kynkäänniemi et al., arXiv 2404.07724): plain outside of it."""
    return lambda latents, step: (guided if low <= step.time <= high else plain)(latents, step)


def refined(
    denoiser: Denoiser, schedule: DDIMScheduler, observe: Observer, target: Tensor, refinement: Refinement
) -> Denoiser:
    """A denoiser whose estimate of the clean latents moves towards a target map before it is handed on.

    Each image is treated alone, whatever else is in its batch. The target is (B, C, h', w').
    """
    low, high = (fraction * schedule.config.num_train_timesteps for fraction in refinement.interval)

    def refine(latents: Tensor, step: Step) -> Tensor:
        prediction = denoiser(latents, step)
        if not low <= step.time <= high:
            return prediction
        clean = clean_estimate(schedule, latents, prediction, step.time).float()
        for _ in range(refinement.steps):
            clean = clean + _step(clean, observe, target, refinement)
        return implied_prediction(schedule, latents, clean.to(latents.dtype), step.time)

    return refine


def _step(clean: Tensor, observe: Observer, target: Tensor, refinement: Refinement) -> Tensor:
    """One step down the gradient, of equal length for each image that is not there yet."""
    # Gradients need tensors that were not made in inference mode, in which Lightning evaluates.
    with torch.inference_mode(False), torch.enable_grad():
        candidate, target = clean.clone().requires_grad_(), target.clone()
        maps = observe(candidate)
        cosine = cosine_similarity(maps, target, dim=1).flatten(1).mean(1)
        distance = 1 - cosine
        if refinement.distance == "l2":
            distance = (maps - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1)
        (gradient,) = torch.autograd.grad(distance.sum(), candidate)
    size = gradient.flatten(1).square().mean(1).sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
    length = refinement.step_size * (cosine.detach() < refinement.target) / size
    return -length.view(-1, 1, 1, 1) * gradient
