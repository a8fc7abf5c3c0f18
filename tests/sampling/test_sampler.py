"""From noise to latents with each solver."""

import json
from dataclasses import asdict
from itertools import combinations
from typing import Any, get_args, get_type_hints

import pytest
import torch
from diffusers import DDIMScheduler
from schedules import make_schedule
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.sampling.sampler import AUTHORS, Refinement, Sampler
from featinv_pl.sampling.solvers import SCHEDULERS, Denoiser, sample

SOLVERS: list[Any] = list(get_args(get_type_hints(Sampler)["scheduler"]))
SHAPE = (2, 4, 4, 4)


def perfect_denoiser(schedule: DDIMScheduler, goal: Tensor) -> Denoiser:
    """Knows the image, and so returns the true noise or velocity."""

    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        signal: Tensor = schedule.alphas_cumprod[timestep]
        noise = (latents - signal.sqrt() * goal) / (1 - signal).sqrt()
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * goal
        return {"epsilon": noise, "v_prediction": velocity}[schedule.config.prediction_type]

    return denoise


@pytest.fixture
def denoiser() -> Denoiser:
    """A network that knows nothing."""
    network = torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    return lambda latents, timestep: network(latents).tanh() * (1 + timestep / 1000)


def test_every_solver_that_the_type_allows_exists() -> None:
    assert set(SOLVERS) == set(SCHEDULERS)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_perfect_denoiser_is_followed_to_its_image(solver: Any, prediction_type: str, steps: int) -> None:
    schedule = make_schedule(set_alpha_to_one=True, prediction_type=prediction_type)
    goal, noise = 0.5 * torch.randn(SHAPE), torch.randn(SHAPE)
    drawn = sample(perfect_denoiser(schedule, goal), noise, schedule, Sampler(solver, steps))
    torch.testing.assert_close(drawn, goal, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_of_stable_diffusion_ends_at_the_least_noise_of_training(steps: int) -> None:
    schedule = make_schedule(set_alpha_to_one=False)
    goal, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    drawn = sample(perfect_denoiser(schedule, goal), noise, schedule, Sampler("ddim", steps))
    first, last = schedule.alphas_cumprod[1000 - 1000 // steps + 1], schedule.alphas_cumprod[0]
    true_noise = (noise - first.sqrt() * goal) / (1 - first).sqrt()  # without eta it never changes
    torch.testing.assert_close(drawn, last.sqrt() * goal + (1 - last).sqrt() * true_noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_call_a_step_at_the_times_of_diffusers(solver: Any, spacing: Any) -> None:
    times: list[int] = []

    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        times.append(int(timestep))
        return latents

    schedule = make_schedule(timestep_spacing="trailing")  # what the prior's configuration says does not count
    sample(denoise, torch.randn(SHAPE), schedule, Sampler(solver, 10, spacing=spacing))
    theirs: Any = SCHEDULERS[solver](steps_offset=1, **({} if spacing is None else {"timestep_spacing": spacing}))
    theirs.set_timesteps(10)
    assert times == theirs.timesteps.tolist()
    if solver == "ddim" and spacing is None:
        assert times == list(range(901, 0, -100))


def test_latents_are_finite_repeatable_and_their_own(denoiser: Denoiser) -> None:
    noise, schedule = torch.randn(5, 4, 4, 4), make_schedule(set_alpha_to_one=False)
    kept, found = noise.clone(), []
    for solver in SOLVERS:
        drawn = sample(denoiser, noise, schedule, Sampler(solver, 4))
        assert drawn.isfinite().all()
        assert torch.equal(noise, kept)
        torch.manual_seed(5)
        assert torch.equal(sample(denoiser, noise, schedule, Sampler(solver, 4)), drawn)
        backwards = sample(denoiser, noise.flip(0)[:3], schedule, Sampler(solver, 4))
        torch.testing.assert_close(backwards, drawn.flip(0)[:3], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(drawn[0], drawn[1], atol=0.1)
        found.append(drawn)
    assert all(not torch.allclose(one, other, atol=1e-3) for one, other in combinations(found, 2))


def test_defaults_are_ours_and_the_authors_have_a_name() -> None:
    assert Sampler() == Sampler(scheduler="dpm", steps=15, guidance_scale=1.5, guidance="features")
    assert Sampler(scheduler="ddim", steps=50, guidance_scale=1.75, guidance="text", spacing="leading") == AUTHORS


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        (Sampler, "steps", 0),
        (Sampler, "best_of", 0),
        (Sampler, "guidance_interval", (0.5, 0.5)),
        (Sampler, "guidance_interval", (-0.1, 0.5)),
        (Sampler, "guidance_interval", (0.5, 1.1)),
        (Sampler, "control_scale", -1.0),
        (Refinement, "steps", 0),
        (Refinement, "step_size", 0.0),
        (Refinement, "interval", (0.6, 0.4)),
        (Refinement, "target", 1.5),
    ],
)
def test_refuses_what_it_cannot_be(kind: Any, option: str, value: Any) -> None:
    group = "sampler" if kind is Sampler else r"sampler\.refine"
    with pytest.raises(UserError, match=rf"`{group}\.{option}` cannot be .* Give "):
        kind(**{option: value})


@pytest.mark.parametrize(
    "sampler", [Sampler(), Sampler("dpm", refine=Refinement(interval=(0.0, 0.4)), guidance_interval=(0.1, 0.9))]
)
def test_sampler_survives_json(sampler: Sampler) -> None:
    assert Sampler.from_fields(json.loads(json.dumps(asdict(sampler)))) == sampler


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [999, 1001])
def test_refuses_more_steps_than_the_schedule_has(solver: Any, steps: int) -> None:
    schedule, noise = make_schedule(), torch.randn(1, 4, 2, 2)
    with pytest.raises(UserError, match="steps"):
        sample(lambda latents, timestep: latents, noise, schedule, Sampler(solver, steps))
