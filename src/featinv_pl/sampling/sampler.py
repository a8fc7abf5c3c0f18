"""Sampling: from noise to latents, by any denoiser."""

from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, ClassVar, Literal, Self

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.sampling.guidance import Denoiser
from featinv_pl.sampling.refinement import Refinement

SCHEDULERS = {"ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
SPACINGS = {"ddim": "leading", "dpm": "linspace", "unipc": "linspace"}  # as diffusers, and measured in docs/better.md


MOST = 1000  # candidates or gradient steps, each of which takes its time


@dataclass(frozen=True)
class Sampler:
    """How reconstructions are drawn. The defaults are what docs/better.md found; `AUTHORS` is what the authors do.

    Args:
        scheduler: `ddim`, `dpm` (DPM-Solver++) or `unipc`, all from diffusers.
        steps: Number of denoising steps.
        spacing: How the steps are placed in the noise schedule (Lin et al., arXiv 2305.08891, table 2): `leading`
            never visits its noisiest end, `trailing` starts there, `linspace` visits both ends. None is `leading`
            for `ddim` and `linspace` for the others.
        guidance_scale: Of the guidance; 1 switches it off and halves the cost. In `both`, that of the map.
        guidance: What the unconditional branch lacks: `text` drops the prompt and keeps the map, as
            the authors do; `features` drops both, which is the pair that training has seen; `both` guides by
            the map and by the prompt with a scale for each, and wants a model that has seen maps without
            prompt (`--model.dropout_prompt`).
        text_scale: Scale of the prompt in `both`.
        guidance_interval: Where guidance acts, in fractions of the noise schedule: 0 is the clean end.
        control_scale: Multiplies what the control adds to the prior. 0 is the bare prior: with `refine`,
            inversion without any training.
        refine: Gradient steps towards the map between the denoising steps.
        best_of: Draws so many candidates and keeps the one whose map is the most similar.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    scheduler: Literal["ddim", "dpm", "unipc"] = "dpm"
    steps: int = 15
    guidance_scale: float = 1.5
    guidance: Literal["text", "features", "both"] = "features"
    text_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    control_scale: float = 1.0
    refine: Refinement | None = None
    best_of: int = 1
    spacing: Literal["leading", "trailing", "linspace"] | None = None

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        for name, value, valid in (
            ("steps", self.steps, self.steps >= 1),
            ("guidance_scale", self.guidance_scale, isfinite(self.guidance_scale)),
            ("text_scale", self.text_scale, isfinite(self.text_scale)),
            ("best_of", self.best_of, 1 <= self.best_of <= MOST),
            ("refine.steps", self.refine and self.refine.steps, self.refine is None or self.refine.steps <= MOST),
            ("guidance_interval", list(self.guidance_interval), 0 <= low < high <= 1),
            ("control_scale", self.control_scale, 0 <= self.control_scale < inf),
        ):
            if not valid:
                raise UserError(f"--model.sampler.{name} cannot be {value}. {_RANGES[name]}")

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Build a sampler from what `dataclasses.asdict` made of one, by way of JSON.

        Raises:
            ValidationError: A field is unknown, or has a value that it cannot have.
        """
        return TypeAdapter(cls).validate_python({"spacing": "leading", **fields})  # that of folders without the field

    @property
    def guidance_weights(self) -> tuple[float, ...]:
        """Of the branches: neither map nor prompt (`text`: no prompt), in `both` the map alone, and both."""
        if self.guidance == "both":
            return 1 - self.guidance_scale, self.guidance_scale - self.text_scale, self.text_scale
        return 1 - self.guidance_scale, self.guidance_scale

    @property
    def guided(self) -> bool:
        """Whether any branch but the conditional one counts."""
        return any(self.guidance_weights[:-1])


AUTHORS = Sampler("ddim", steps=50, guidance_scale=1.75, guidance="text", spacing="leading")
_RANGES = {
    "steps": "Give at least 1.",
    "guidance_scale": "Give a number; 1 is no guidance.",
    "text_scale": "Give a number; 1 is no guidance by the prompt.",
    "best_of": f"Give 1 to {MOST}.",
    "refine.steps": f"Give at most {MOST}.",
    "guidance_interval": "Give two fractions of the noise schedule, such as [0.1, 0.8], the smaller one first.",
    "control_scale": "Give at least 0; 1 is what the control was trained for.",
}


def sample(denoiser: Denoiser, noise: Tensor, schedule: DDIMScheduler, sampler: Sampler) -> Tensor:
    """Draw latents from noise.

    Args:
        denoiser: Predicts noise, or velocity where the schedule says so.
        noise: (B, channels, h, w), standard normal.
        schedule: The schedule that the prior was trained with.
        sampler: Which solver, and how many steps.

    Returns:
        Latents of the shape of `noise`, scaled to unit variance.
    """
    longest = schedule.config.num_train_timesteps - 2  # with its offset, more would leave the schedule
    if sampler.steps > longest:
        raise UserError(f"--model.sampler.steps must be at most {longest} for this prior, and is {sampler.steps}.")
    # A solver has state, so each call makes its own. Spacing is explicit: the prior's configuration may say anything.
    spacing = sampler.spacing or SPACINGS[sampler.scheduler]
    solver = SCHEDULERS[sampler.scheduler].from_config(schedule.config, timestep_spacing=spacing)
    solver.set_timesteps(sampler.steps, device=noise.device)
    latents: Tensor = noise * solver.init_noise_sigma
    for timestep in solver.timesteps:
        latents = solver.step(denoiser(latents, timestep), timestep, latents, return_dict=False)[0]
    return latents
