"""Refinement: the estimate of the clean latents is moved towards what is asked for, at every denoising step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from diffusers import DDIMScheduler
from pydantic import ConfigDict
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.errors import UserError
from featinv_pl.sampling.diffusion import clean_estimate, implied_prediction
from featinv_pl.sampling.guidance import Denoiser

Observer = Callable[[Tensor], Tensor]
"""Clean latents (B, channels, h, w) -> the feature maps (B, C, h', w') of their images, with gradients."""


@dataclass(frozen=True)
class Refinement:
    """Gradient steps towards the target map, by the backbone itself.

    At each denoising step the estimate of the clean latents is decoded and looked at, and moved against the
    gradient of its map's distance to the target (guidance by a clean estimate, as in FreeDoM, arXiv 2303.09833,
    and in arXiv 2509.07936). The gradient passes through autoencoder and backbone, not through the prior.
    The defaults suit a trained control; without one it takes larger steps at all levels of noise, such as 5 of 0.1.

    Args:
        steps: Gradient steps at each denoising step.
        step_size: How far a gradient step moves latents of unit variance: the root mean square of their change.
        distance: What is decreased: 1 - cosine, mean over locations, or `l2`, the squared error relative to
            the target's square.
        interval: Where, in fractions of the noise schedule: 0 is the clean end, 1 pure noise.
        target: The cosine at which an image is left as it is.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    steps: int = 3
    step_size: float = 0.02
    distance: Literal["cosine", "l2"] = "cosine"
    interval: tuple[float, float] = (0.0, 0.3)
    target: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.interval
        for name, value, valid in (
            ("steps", self.steps, self.steps >= 1),
            ("step_size", self.step_size, self.step_size > 0),
            ("interval", list(self.interval), 0 <= low < high <= 1),
            ("target", self.target, -1 <= self.target <= 1),
        ):
            if not valid:
                raise UserError(f"`sampler.refine.{name}` cannot be {value}. {_RANGES[name]}")


_RANGES = {
    "steps": "Give at least 1.",
    "step_size": "Give a number above 0; 0.1 is a tenth of the latents' spread.",
    "interval": "Give two fractions of the noise schedule, such as [0.0, 0.5], the smaller one first.",
    "target": "Give a cosine, from -1 to 1.",
}


def refined(
    denoiser: Denoiser, schedule: DDIMScheduler, observe: Observer, target: Tensor, refinement: Refinement
) -> Denoiser:
    """A denoiser whose estimate of the clean latents moves towards a target map before it is handed on.

    Each image is treated alone, whatever else is in its batch.

    Args:
        denoiser: Predicts noise, or velocity where the schedule says so.
        schedule: The schedule that the prior was trained with.
        observe: From clean latents to feature maps.
        target: (B, C, h', w'), the maps that are asked for.
        refinement: How.
    """
    low, high = (fraction * schedule.config.num_train_timesteps for fraction in refinement.interval)

    def refine(latents: Tensor, timestep: Tensor) -> Tensor:
        prediction = denoiser(latents, timestep)
        if not low <= timestep <= high:
            return prediction
        clean = clean_estimate(schedule, latents, prediction, timestep).float()
        for _ in range(refinement.steps):
            clean = clean + _step(clean, observe, target, refinement)
        return implied_prediction(schedule, latents, clean.to(latents.dtype), timestep)

    return refine


def _step(clean: Tensor, observe: Observer, target: Tensor, refinement: Refinement) -> Tensor:
    """One step down the gradient, of equal length for each image that is not there yet."""
    # Gradients need tensors that were not made in inference mode, in which Lightning evaluates.
    with torch.inference_mode(False), torch.enable_grad():
        candidate, target = clean.clone().requires_grad_(), target.clone()
        maps = observe(candidate)
        cosine = cosine_similarity(maps, target, dim=1).flatten(1).mean(1)
        if refinement.distance == "cosine":
            distance = 1 - cosine
        else:
            distance = (maps - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1)
        (gradient,) = torch.autograd.grad(distance.sum(), candidate)
    size = gradient.flatten(1).square().mean(1).sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
    length = refinement.step_size * (cosine.detach() < refinement.target) / size
    return -length.view(-1, 1, 1, 1) * gradient
