"""From noise to latents: solvers, guidance by its formula, and gradient steps towards a target map."""

import json
from dataclasses import asdict
from itertools import combinations
from typing import Any, get_args, get_type_hints

import pytest
import torch
from schedules import make_schedule
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from featinv_pl.errors import UserError
from featinv_pl.sampling.diffusion import implied_prediction
from featinv_pl.sampling.sampler import AUTHORS, Refinement, Sampler
from featinv_pl.sampling.solvers import SCHEDULERS, Denoiser, refined, sample, weighted, within

SOLVERS: list[Any] = list(get_args(get_type_hints(Sampler)["scheduler"]))
SHAPE = (2, 4, 4, 4)


@pytest.fixture
def denoiser() -> Denoiser:
    """A network that knows nothing."""
    network = torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    return lambda latents, timestep: network(latents).tanh() * (1 + timestep / 1000)


def test_every_solver_that_the_type_allows_exists() -> None:
    assert set(SOLVERS) == set(SCHEDULERS)


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_of_stable_diffusion_ends_at_the_least_noise_of_training(steps: int) -> None:
    schedule = make_schedule(set_alpha_to_one=False)
    goal, noise = torch.randn(SHAPE), torch.randn(SHAPE)

    def perfect(latents: Tensor, timestep: Tensor) -> Tensor:
        signal: Tensor = schedule.alphas_cumprod[timestep]
        return (latents - signal.sqrt() * goal) / (1 - signal).sqrt()

    drawn = sample(perfect, noise, schedule, Sampler("ddim", steps))
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


# Guidance


@pytest.mark.parametrize(
    ("scale", "expected"),
    # For x = 3 and t = 4 the branches say 6 and 34.
    [(0.0, 6.0), (1.0, 34.0), (1.75, 6 + 1.75 * 28), (-1.0, -22.0)],
)
def test_goes_from_the_unconditional_through_the_conditional(scale: float, expected: float) -> None:
    calls: list[Tensor] = []

    def branches(latents: Tensor, timestep: Tensor) -> Tensor:
        """A denoiser whose first branch says 2x, and whose second says 10x plus the time."""
        calls.append(latents)
        unconditional, conditional = latents.chunk(2)
        return torch.cat([2 * unconditional, 10 * conditional + timestep])

    latents = torch.full((2, 4, 3, 3), 3.0)
    guided = weighted(branches, scale)(latents, torch.tensor(4))
    torch.testing.assert_close(guided, torch.full_like(latents, expected))
    [both] = calls
    assert torch.equal(both, torch.cat([latents, latents]))


@pytest.mark.parametrize(("timestep", "guided"), [(99, False), (100, True), (500, True), (800, True), (801, False)])
def test_guidance_acts_within_its_interval_alone(timestep: int, guided: bool) -> None:
    limited = within(lambda latents, _: latents + 1, lambda latents, _: latents, 100, 800)
    assert limited(torch.zeros(1), torch.tensor(timestep)).item() == guided


# Refinement


@pytest.fixture
def observe() -> nn.Module:
    """A small convolution stands for autoencoder and backbone."""
    return nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)


def drawn(observe: Any, refinement: Refinement | None, target: Tensor, noise: Tensor, **options: Any) -> Tensor:
    """What a prior that knows nothing draws: its estimate of the clean latents is always zero, plus a trifle."""
    schedule = make_schedule(**options)

    def plain(latents: Tensor, timestep: Tensor) -> Tensor:
        return implied_prediction(schedule, latents, 0.01 * latents, timestep)

    denoiser: Denoiser = refined(plain, schedule, observe, target, refinement) if refinement else plain
    return sample(denoiser, noise, schedule, Sampler("ddim", 10))


def cosines(observe: Any, latents: Tensor, target: Tensor) -> Tensor:
    return cosine_similarity(observe(latents), target).mean((1, 2))


@pytest.mark.parametrize(("prediction_type", "distance"), [("epsilon", "cosine"), ("v_prediction", "l2")])
def test_moves_towards_the_target(observe: Any, prediction_type: str, distance: Any) -> None:
    target, noise = observe(torch.randn(3, 4, 4, 4)), torch.randn(3, 4, 4, 4)
    refinement = Refinement(steps=30, step_size=0.05, distance=distance, interval=(0, 1))
    plain = drawn(observe, None, target, noise, prediction_type=prediction_type)
    moved = drawn(observe, refinement, target, noise, prediction_type=prediction_type)
    assert (cosines(observe, moved, target) > 0.9).all()
    assert (cosines(observe, plain, target) < 0.5).all()


def test_stops_at_its_target_cosine(observe: Any) -> None:
    target, noise = observe(torch.randn(3, 4, 4, 4)), torch.randn(3, 4, 4, 4)
    near = drawn(observe, Refinement(steps=30, target=0.7, interval=(0, 1)), target, noise)
    assert ((cosines(observe, near, target) > 0.6) & (cosines(observe, near, target) < 0.85)).all()


def test_acts_within_its_interval_alone(observe: Any) -> None:
    target, noise = observe(torch.randn(2, 4, 4, 4)), torch.randn(2, 4, 4, 4)
    plain = drawn(observe, None, target, noise)
    seen: list[Tensor] = []

    def watched(latents: Tensor) -> Tensor:
        seen.append(latents)
        return observe(latents)  # type: ignore[no-any-return]

    assert torch.equal(drawn(watched, Refinement(interval=(0.99, 1.0)), target, noise), plain)
    assert not seen
    drawn(watched, Refinement(steps=1, interval=(0.0, 0.45)), target, noise)
    assert len(seen) == 5  # of ten denoising steps, at 401, 301, ... 1


def test_an_image_is_treated_alone(observe: Any) -> None:
    target, noise = observe(torch.randn(3, 4, 4, 4)), torch.randn(3, 4, 4, 4)
    refinement = Refinement(steps=3, target=0.9)
    whole = drawn(observe, refinement, target, noise)
    torch.testing.assert_close(drawn(observe, refinement, target[1:2], noise[1:2]), whole[1:2], atol=1e-5, rtol=1e-4)


def test_works_while_lightning_evaluates(observe: Any) -> None:
    with torch.inference_mode():
        target, noise = observe(torch.randn(2, 4, 4, 4)), torch.randn(2, 4, 4, 4)
        moved = drawn(observe, Refinement(steps=20, step_size=0.1), target, noise)
        assert (cosines(observe, moved, target) > 0.8).all()


def test_a_perfect_estimate_stays_finite(observe: Any) -> None:
    """Where there is no gradient there is no direction."""
    target = torch.zeros(1, 6, 4, 4)
    assert drawn(lambda latents: observe(latents) * 0, Refinement(), target, torch.randn(1, 4, 4, 4)).isfinite().all()
