"""Gradient steps of the estimate towards a target map."""

from typing import Any

import pytest
import torch
from schedules import make_schedule
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from featinv_pl.sampling.diffusion import implied_prediction
from featinv_pl.sampling.sampler import Refinement, Sampler
from featinv_pl.sampling.solvers import Denoiser, refined, sample


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
