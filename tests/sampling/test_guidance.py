"""Classifier-free guidance, by its formula."""

import pytest
import torch
from torch import Tensor

from featinv_pl.sampling.solvers import weighted, within


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
