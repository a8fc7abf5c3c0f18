"""Guidance: functions that wrap a denoiser."""

from collections.abc import Callable, Sequence

from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(latents (B, channels, h, w), scalar timestep) -> prediction of the same shape as the latents."""


def weighted(branches: Denoiser, weights: Sequence[float]) -> Denoiser:
    """Classifier-free guidance: a weighted sum of what a denoiser predicts under different conditions.

    With one scale s, the weights of the unconditional and the conditional branch are 1 - s and s (Ho and
    Salimans, arXiv 2207.12598, in the form of Stable Diffusion). With scales s and t of two conditions, those
    of neither, the first, and both are 1 - s, s - t and t (Brooks et al., arXiv 2211.09800).

    Args:
        branches: Takes a batch repeated once for each branch, so that all branches cost one call.
        weights: One for each branch; their sum is 1.
    """

    def guided(latents: Tensor, timestep: Tensor) -> Tensor:
        repeated = latents.repeat(len(weights), *[1] * (latents.ndim - 1))
        predictions = branches(repeated, timestep).unflatten(0, (len(weights), -1))
        factors = predictions.new_tensor(weights).view(-1, *[1] * latents.ndim)
        combined: Tensor = (predictions * factors).sum(0)
        return combined

    return guided


def within(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """Guidance in a limited interval of timesteps (Kynkäänniemi et al., arXiv 2404.07724).

    Args:
        guided: The denoiser from `low` to `high`.
        plain: The denoiser elsewhere.
        low: The first timestep of the interval.
        high: The last.
    """

    def limited(latents: Tensor, timestep: Tensor) -> Tensor:
        return (guided if low <= timestep <= high else plain)(latents, timestep)

    return limited
