"""From noise to latents: solvers, guidance by its formula, and gradient steps towards a target map."""

import json
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any, get_args, get_type_hints

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from featinv_pl.errors import UserError
from featinv_pl.sampling.diffusion import clean_estimate, denoising_target, implied_prediction, timestep_weights
from featinv_pl.sampling.noise import generator, keyed_noise
from featinv_pl.sampling.sampler import Refinement, Sampler
from featinv_pl.sampling.solvers import SCHEDULERS, Denoiser, Step, refined, sample, weighted, within

SOLVERS: list[Any] = list(get_args(get_type_hints(Sampler)["scheduler"]))
SHAPE = (2, 4, 4, 4)


def make_schedule(**options: Any) -> DDIMScheduler:
    """That of Stable Diffusion."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, steps_offset=1, **options)


@pytest.fixture
def denoiser() -> Denoiser:
    """A network that knows nothing."""
    network = torch.nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    return lambda latents, step: network(latents).tanh() * (1 + step.timestep / 1000)


@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_call_a_step_at_the_times_of_diffusers(solver: Any, spacing: Any) -> None:
    times: list[int] = []

    def denoise(latents: Tensor, step: Step) -> Tensor:
        assert (step.number, step.time) == (len(times), int(step.timestep))
        times.append(step.time)
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


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        (Sampler, "steps", 0),
        (Sampler, "best_of", 0),
        (Sampler, "guidance_interval", (0.5, 0.5)),
        (Sampler, "guidance_interval", (0.5, 1.1)),
        (Sampler, "control_scale", -1.0),
        (Sampler, "guidance_every", 0),
        (Sampler, "control_every", 0),
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
    sampler = Sampler(refine=Refinement(interval=(0.0, 0.4)), guidance_interval=(0.1, 0.9))
    assert Sampler.from_fields(json.loads(json.dumps(asdict(sampler)))) == sampler


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [999, 1001])
def test_refuses_more_steps_than_the_schedule_has(solver: Any, steps: int) -> None:
    schedule, noise = make_schedule(), torch.randn(1, 4, 2, 2)
    with pytest.raises(UserError, match="steps"):
        sample(lambda latents, _: latents, noise, schedule, Sampler(solver, steps))


def at(time: int, number: int = 0) -> Step:
    return Step(number, time, torch.tensor(time))


# Guidance


@pytest.mark.parametrize(
    ("scale", "expected"),
    # For x = 3 and t = 4 the branches say 6 and 34.
    [(0.0, 6.0), (1.0, 34.0), (1.75, 6 + 1.75 * 28), (-1.0, -22.0)],
)
def test_goes_from_the_unconditional_through_the_conditional(scale: float, expected: float) -> None:
    calls: list[Tensor] = []

    def branches(latents: Tensor, step: Step) -> Tensor:
        """A denoiser whose first branch says 2x, and whose second says 10x plus the time; the second one alone."""
        calls.append(latents)
        conditional = 10 * latents[-2:] + step.timestep
        return conditional if len(latents) == 2 else torch.cat([2 * latents[:2], conditional])

    latents = torch.full((2, 4, 3, 3), 3.0)
    guided = weighted(branches, scale, every=2)
    torch.testing.assert_close(guided(latents, at(4)), torch.full_like(latents, expected))
    [both] = calls
    assert torch.equal(both, torch.cat([latents, latents]))
    # Where the unconditional branch is left out, the last difference still acts: that of 34 and 6.
    torch.testing.assert_close(guided(latents + 1, at(5, 1)), torch.full_like(latents, 45 + (scale - 1) * 28))
    assert torch.equal(calls[1], latents + 1)
    guided(latents, at(6, 2))
    assert len(calls[2]) == 4


@pytest.mark.parametrize(("timestep", "guided"), [(99, False), (100, True), (500, True), (800, True), (801, False)])
def test_guidance_acts_within_its_interval_alone(timestep: int, guided: bool) -> None:
    limited = within(lambda latents, _: latents + 1, lambda latents, _: latents, 100, 800)
    assert limited(torch.zeros(1), at(timestep)).item() == guided


# Refinement


@pytest.fixture
def observe() -> nn.Module:
    """A small convolution stands for autoencoder and backbone."""
    return nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)


def drawn(observe: Any, refinement: Refinement | None, target: Tensor, noise: Tensor, **options: Any) -> Tensor:
    """What a prior that knows nothing draws: its estimate of the clean latents is always zero, plus a trifle."""
    schedule = make_schedule(**options)

    def plain(latents: Tensor, step: Step) -> Tensor:
        return implied_prediction(schedule, latents, 0.01 * latents, step.time)

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
    with torch.inference_mode():  # as Lightning evaluates; and an image is treated alone
        one, all_three = (drawn(observe, Refinement(steps=3), target[i:j], noise[i:j]) for i, j in ((1, 2), (0, 3)))
    torch.testing.assert_close(one, all_three[1:2], atol=1e-5, rtol=1e-4)
    near = drawn(observe, replace(refinement, target=0.7), target, noise, prediction_type=prediction_type)
    assert ((cosines(observe, near, target) > 0.6) & (cosines(observe, near, target) < 0.85)).all()
    nothing = drawn(lambda latents: observe(latents) * 0, Refinement(), target * 0, noise)  # where there is no gradient
    assert nothing.isfinite().all()


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


PREDICTIONS = ["epsilon", "v_prediction"]


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_prediction_implies_the_clean_latents(prediction_type: str) -> None:
    schedule = make_schedule(prediction_type=prediction_type)
    clean, noise = torch.randn(2, 5, 4, 3, 3).unbind(0)
    timesteps = torch.tensor([0, 1, 500, 900, 999])
    noisy = schedule.add_noise(clean, noise, timesteps)
    target = denoising_target(schedule, clean, noise, timesteps)
    torch.testing.assert_close(clean_estimate(schedule, noisy, target, timesteps), clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(implied_prediction(schedule, noisy, clean, timesteps), target, atol=1e-4, rtol=1e-4)
    schedule.set_timesteps(10)
    timestep = int(schedule.timesteps[4])
    theirs = schedule.step(noise, timestep, noisy).pred_original_sample
    torch.testing.assert_close(clean_estimate(schedule, noisy, noise, timestep), theirs, atol=1e-5, rtol=1e-5)


def test_velocity_and_noise_weights_are_those_of_the_paper() -> None:
    timesteps = torch.tensor([0, 300, 999])
    alphas = make_schedule(prediction_type="epsilon").alphas_cumprod[timesteps]
    ratio = alphas / (1 - alphas)
    assert ratio[0] > 5 > ratio[2]
    cut = torch.minimum(ratio, torch.tensor(5.0))
    for prediction_type, expected in (("epsilon", cut / ratio), ("v_prediction", cut / (ratio + 1))):
        weights = timestep_weights(make_schedule(prediction_type=prediction_type), timesteps, "min-snr")
        torch.testing.assert_close(weights, expected)


def test_velocity_weights_make_an_error_of_the_noise_that_of_the_velocity() -> None:
    latents, noise, error = torch.randn(3, 5, 4, 4, 4)
    timesteps = torch.tensor([0, 10, 300, 700, 999])
    for_noise, for_velocity = (make_schedule(prediction_type=name) for name in ("epsilon", "v_prediction"))
    noisy = for_noise.add_noise(latents, noise, timesteps)
    clean = clean_estimate(for_noise, noisy, noise + error, timesteps)
    velocity = implied_prediction(for_velocity, noisy, clean, timesteps)
    expected = (velocity - denoising_target(for_velocity, latents, noise, timesteps)).square().mean((1, 2, 3))
    weights = timestep_weights(for_noise, timesteps, "velocity")
    torch.testing.assert_close(weights * error.square().mean((1, 2, 3)), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(timestep_weights(for_velocity, timesteps, "velocity"), torch.ones(5))


def test_noise_of_a_key_is_the_same_in_every_batch() -> None:
    before = torch.get_rng_state()
    together = dict(zip("abc", keyed_noise(list("abc"), (4, 3, 2), 1), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    shuffled = dict(zip("cda", keyed_noise(list("cda"), (4, 3, 2), 1), strict=True))
    assert torch.equal(together["a"], shuffled["a"])
    assert torch.equal(together["c"], shuffled["c"])
    assert torch.equal(together["a"][None], keyed_noise(["a"], (4, 3, 2), 1))
    assert not torch.equal(together["a"], together["b"])
    assert not torch.equal(together["a"], keyed_noise(["a"], (4, 3, 2), 2)[0])


def test_noise_is_standard_normal() -> None:
    noise = keyed_noise([str(number) for number in range(200)], (8, 8), 0)
    # Within four standard errors, for each place and over all.
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert noise.mean(0).abs().max() < 4 / 200**0.5
    assert (noise.var() - 1).abs() < 4 * (2 / noise.numel()) ** 0.5


@pytest.mark.parametrize("other", [(0, 1, 3), (0, 2, 1), (1, 1, 2), (0, 12), (0, 1, 2, 0), ("0", "1", "2x")])
def test_generators_of_other_identities_differ(other: tuple[int | str, ...]) -> None:
    first, again, different = (torch.randn(8, generator=generator(*one)) for one in ((0, 1, 2), (0, 1, 2), other))
    assert torch.equal(first, again)
    assert not torch.equal(first, different)


def test_seed_is_the_same_in_every_process_and_version() -> None:
    # Pinned: Python's own hash of a string would differ from process to process.
    assert generator(0, "clean/0001").initial_seed() == 8556001235840895831
