"""Noise schedules for the tests."""

from typing import Any

from diffusers import DDIMScheduler


def make_schedule(**options: Any) -> DDIMScheduler:
    """That of Stable Diffusion."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, steps_offset=1, **options)
