"""Classifier-free guidance, by its formula."""

import pytest
import torch
from torch import Tensor

from featinv_pl.sampling.guidance import classifier_free


def branches(latents: Tensor, timestep: Tensor) -> Tensor:
    """A denoiser whose unconditional half says 2x, and whose conditional half says 10x plus the time."""
    unconditional, conditional = latents.chunk(2)
    return torch.cat([2 * unconditional, 10 * conditional + timestep])


@pytest.mark.parametrize(
    ("scale", "expected"),
    # For x = 3 and t = 4 the branches say 6 and 34.
    [(0.0, 6.0), (1.0, 34.0), (1.75, 6 + 1.75 * 28), (-1.0, -22.0)],
)
def test_goes_from_the_unconditional_through_the_conditional(scale: float, expected: float) -> None:
    latents = torch.full((2, 4, 3, 3), 3.0)
    guided = classifier_free(branches, scale)(latents, torch.tensor(4))
    torch.testing.assert_close(guided, torch.full_like(latents, expected))


def test_both_branches_share_one_call_on_the_same_latents() -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def denoiser(latents: Tensor, timestep: Tensor) -> Tensor:
        calls.append((latents, timestep))
        return latents

    latents = torch.randn(3, 4, 2, 2)
    guided = classifier_free(denoiser, 1.75)(latents, torch.tensor(7))
    torch.testing.assert_close(guided, latents)
    assert len(calls) == 1
    assert torch.equal(calls[0][0], torch.cat([latents, latents]))
    assert calls[0][1] == 7
