"""Classifier-free guidance, by its formula."""

import pytest
import torch
from torch import Tensor

from featinv_pl.sampling.guidance import weighted, within


def branches(latents: Tensor, timestep: Tensor) -> Tensor:
    """A denoiser whose first branch says 2x, and whose second says 10x plus the time."""
    unconditional, conditional = latents.chunk(2)
    return torch.cat([2 * unconditional, 10 * conditional + timestep])


@pytest.mark.parametrize(
    ("scale", "expected"),
    # For x = 3 and t = 4 the branches say 6 and 34.
    [(0.0, 6.0), (1.0, 34.0), (1.75, 6 + 1.75 * 28), (-1.0, -22.0)],
)
def test_goes_from_the_unconditional_through_the_conditional(scale: float, expected: float) -> None:
    latents = torch.full((2, 4, 3, 3), 3.0)
    guided = weighted(branches, scale)(latents, torch.tensor(4))
    torch.testing.assert_close(guided, torch.full_like(latents, expected))


def test_both_branches_share_one_call_on_the_same_latents() -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def denoiser(latents: Tensor, timestep: Tensor) -> Tensor:
        calls.append((latents, timestep))
        return latents

    latents = torch.randn(3, 4, 2, 2)
    guided = weighted(denoiser, 1.75)(latents, torch.tensor(7))
    torch.testing.assert_close(guided, latents)
    assert len(calls) == 1
    assert torch.equal(calls[0][0], torch.cat([latents, latents]))
    assert calls[0][1] == 7


@pytest.mark.parametrize(("timestep", "guided"), [(99, False), (100, True), (500, True), (800, True), (801, False)])
def test_guidance_acts_within_its_interval_alone(timestep: int, guided: bool) -> None:
    limited = within(lambda latents, _: latents + 1, lambda latents, _: latents, 100, 800)
    assert limited(torch.zeros(1), torch.tensor(timestep)).item() == guided
