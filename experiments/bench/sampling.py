"""Sampling one image: as the authors do, in a plain loop of diffusers' parts, and as we do."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import machine
from featinv_pl.nets.frozen import keep_products_in
from featinv_pl.sampling.sampler import AUTHORS, Sampler
from featinv_pl.sampling.solvers import SCHEDULERS
from featinv_pl.tasks.inversion import FeatureInversion

SCALE = AUTHORS.guidance_scale


@dataclass
class Way:
    """A way of sampling.

    Attributes:
        name: For the table.
        draw: Of noise and a number of steps, images.
        seconds: At equal steps.
        flops: Of one image.
        difference: Of its images from the authors' way, relative, at equal steps.
    """

    name: str
    draw: Callable[[Tensor, int], Tensor]
    seconds: list[float] = field(default_factory=list)
    flops: float = 0.0
    difference: float = 0.0


def measure(
    options: dict[str, Any], rounds: int, steps: int, batch_size: int
) -> tuple[list[Way], Tensor, dict[str, float]]:
    """Sample in each way in turn, several times over.

    Args:
        options: Of the FeatureInversion.
        rounds: How often.
        steps: Denoising steps of each.
        batch_size: Images at a time.

    Returns:
        The ways with their times, the noise that all began with, and the rates of plain products in between.
    """
    full, fast = (steered(options).to(machine.DEVICE) for _ in range(2))
    keep_products_in(fast, torch.bfloat16)
    features = torch.randn(batch_size, *full.inverter.classifier.feature_shape, device=machine.DEVICE)
    noise = torch.randn(batch_size, *full.inverter.prior.latent_grid(full.inverter.image_size), device=machine.DEVICE)
    ways = [
        Way("as the authors sample, branch by branch", lambda noise, steps: plain(full, features, noise, steps, False)),
        Way("a plain loop with diffusers' parts", lambda noise, steps: plain(full, features, noise, steps, True)),
        Way("ours, fp32", lambda noise, steps: full.inverter.reconstruct_from(features, noise, as_authors(steps))),
        Way("ours, bf16", lambda noise, steps: in_bf16(fast, features, noise, as_authors(steps))),
    ]
    reference, rates = None, []
    for turn in range(rounds):
        rates.append(machine.product_rates())
        for way in ways:
            start = machine.now()
            images = way.draw(noise, steps).float()
            way.seconds.append((machine.now() - start) / batch_size)
            if turn == 0:
                reference = images if reference is None else reference
                way.difference = float((images - reference).norm() / reference.norm())
    for way in ways[-2:]:
        with FlopCounterMode(display=False) as counter:
            way.draw(noise, steps)
        way.flops = counter.get_total_flops() / batch_size
    ways.append(Way("ours, bf16", lambda noise, steps: in_bf16(fast, features, noise, Sampler(steps=steps))))
    return ways, noise, machine.medians(rates)


@torch.no_grad()
def plain(model: FeatureInversion, features: Tensor, noise: Tensor, steps: int, together: bool) -> Tensor:
    """Guided sampling, with everything computed at every step.

    Args:
        model: Whose networks are used.
        features: (B, C, h, w).
        noise: (B, channels, H / f, W / f).
        steps: Denoising steps.
        together: Whether both branches of guidance go through the networks in one batch, as in diffusers' pipelines.
    """
    unet, control, prior = model.inverter.prior.unet, model.inverter.control, model.inverter.prior
    solver = SCHEDULERS[AUTHORS.scheduler].from_config(prior.schedule.config, timestep_spacing="leading")
    solver.set_timesteps(steps)
    empty, prompt = (one.expand(len(noise), -1, -1) for one in (prior.empty, prior.prompt))

    def predict(latents: Tensor, timestep: Tensor, prompts: Tensor, maps: Tensor) -> Tensor:
        encoded = control.encoder(maps, latents.shape[-2:])
        down, middle = control.controlnet(latents, timestep, prompts, encoded, return_dict=False)
        noise: Tensor = unet(
            latents,
            timestep,
            encoder_hidden_states=prompts,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return noise

    latents = noise
    for timestep in solver.timesteps:
        if together:
            both = torch.cat([empty, prompt])
            free, given = predict(latents.repeat(2, 1, 1, 1), timestep, both, features.repeat(2, 1, 1, 1)).chunk(2)
        else:
            free, given = (predict(latents, timestep, one, features) for one in (empty, prompt))
        latents = solver.step(free + SCALE * (given - free), timestep, latents, return_dict=False)[0]
    return prior.autoencoder.decode(latents)


def as_authors(steps: int) -> Sampler:
    """Their sampler, with fewer steps."""
    return Sampler(AUTHORS.scheduler, steps, SCALE, AUTHORS.guidance)


def in_bf16(model: FeatureInversion, features: Tensor, noise: Tensor, sampler: Sampler) -> Tensor:
    """Sample in mixed precision."""
    with torch.autocast(machine.DEVICE, torch.bfloat16):
        return model.inverter.reconstruct_from(features, noise, sampler)


def final(ways: list[Way], noise: Tensor, long: int, short: int) -> float:
    """How many times faster the last way with few steps is than the first one with many: one image each."""
    slow = machine.timed(lambda: ways[0].draw(noise, long))
    return slow / machine.timed(lambda: ways[-1].draw(noise, short))


def per_image(way: Way) -> float:
    """Seconds, the median."""
    return median(way.seconds)


def steered(options: dict[str, Any]) -> FeatureInversion:
    """An inverter whose control steers, though it is not trained: zeros would hide mistakes."""
    torch.manual_seed(0)
    model = FeatureInversion(**options).eval()
    for parameter in model.inverter.control.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model
