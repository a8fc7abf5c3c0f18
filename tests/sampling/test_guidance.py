"""Classifier-free guidance, by its formula."""

import pytest
import torch
from torch import Tensor

from featinv_pl.sampling.guidance import weighted, within
from featinv_pl.sampling.sampler import Sampler


def branches(latents: Tensor, timestep: Tensor) -> Tensor:
    """A denoiser whose first branch says 2x, and whose second says 10x plus the time."""
    unconditional, conditional = latents.chunk(2)
    return torch.cat([2 * unconditional, 10 * conditional + timestep])


@pytest.mark.parametrize(
    ("scale", "expected"),
    # For x = 3 and t = 4 the branches say 6 and 34.
    [(0.0, 6.0), (1.0, 34.0), (1.75, 6 + 1.75 * 28), (-1.0, -22.0)],
)
@pytest.mark.parametrize("guidance", ["text", "features"])
def test_goes_from_the_unconditional_through_the_conditional(scale: float, expected: float, guidance: str) -> None:
    weights = Sampler(guidance=guidance, guidance_scale=scale).guidance_weights  # type: ignore[arg-type]
    latents = torch.full((2, 4, 3, 3), 3.0)
    guided = weighted(branches, weights)(latents, torch.tensor(4))
    torch.testing.assert_close(guided, torch.full_like(latents, expected))


def test_map_and_prompt_have_a_scale_each() -> None:
    """Neither says 1, the map alone 10, both 100: guided is 1 + 3 (10 - 1) + 2 (100 - 10)."""
    weights = Sampler(guidance="both", guidance_scale=3.0, text_scale=2.0).guidance_weights
    values = torch.tensor([1.0, 10.0, 100.0])

    def three(latents: Tensor, timestep: Tensor) -> Tensor:
        return values.repeat_interleave(len(latents) // 3).view(-1, 1, 1, 1).expand_as(latents)

    guided = weighted(three, weights)(torch.zeros(2, 4, 3, 3), torch.tensor(4))
    torch.testing.assert_close(guided, torch.full((2, 4, 3, 3), 1.0 + 3 * 9 + 2 * 90))


@pytest.mark.parametrize(
    ("sampler", "guided"),
    [
        (Sampler(guidance_scale=1.0), False),
        (Sampler(guidance_scale=1.5), True),
        (Sampler(guidance="both", guidance_scale=1.0, text_scale=1.0), False),
        (Sampler(guidance="both", guidance_scale=1.0, text_scale=2.0), True),
        (Sampler(guidance="both", guidance_scale=2.0, text_scale=2.0), True),
    ],
)
def test_without_guidance_nothing_is_paid_for_it(sampler: Sampler, guided: bool) -> None:
    assert sampler.guided == guided


def test_all_branches_share_one_call_on_the_same_latents() -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def denoiser(latents: Tensor, timestep: Tensor) -> Tensor:
        calls.append((latents, timestep))
        return latents

    latents = torch.randn(3, 4, 2, 2)
    guided = weighted(denoiser, (-0.75, 1.75))(latents, torch.tensor(7))
    torch.testing.assert_close(guided, latents)
    assert len(calls) == 1
    assert torch.equal(calls[0][0], torch.cat([latents, latents]))
    assert calls[0][1] == 7


@pytest.mark.parametrize(("timestep", "guided"), [(99, False), (100, True), (500, True), (800, True), (801, False)])
def test_guidance_acts_within_its_interval_alone(timestep: int, guided: bool) -> None:
    limited = within(lambda latents, _: latents + 1, lambda latents, _: latents, 100, 800)
    assert limited(torch.zeros(1), torch.tensor(timestep)).item() == guided
