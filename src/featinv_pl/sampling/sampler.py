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
    """How reconstructions are sampled. docs/better.md measured the defaults; `AUTHORS` are the authors' settings.

    Args:
        scheduler: `ddim`, `dpm` (DPM-Solver++) or `unipc`, all from diffusers.
        steps: Number of denoising steps.
        spacing: How the steps are placed in the noise schedule (Lin et al., arXiv 2305.08891, table 2): `leading`
            never visits its noisiest end, `trailing` starts there, `linspace` visits both ends. None is `leading`
            for `ddim` and `linspace` for the others.
        guidance_scale: Guidance scale; 1 disables guidance and halves the cost.
        guidance: What the unconditional branch drops: `text` only the prompt, as in the authors' code, `features`
            the feature map too, which is the pair that training uses.
        guidance_interval: Where guidance acts, in fractions of the noise schedule: 0 is the clean end.
        control_scale: Multiplies the control's residuals. 0 is the bare prior: with `refine`, inversion without
            any training.
        refine: Gradient steps towards the feature map between the denoising steps.
        best_of: Number of candidates, of which the one with the most similar feature map is kept.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    scheduler: Literal["ddim", "dpm", "unipc"] = "dpm"
    steps: int = 15
    guidance_scale: float = 1.5
    guidance: Literal["text", "features"] = "features"
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
            ("best_of", self.best_of, 1 <= self.best_of <= MOST),
            ("refine.steps", self.refine and self.refine.steps, self.refine is None or self.refine.steps <= MOST),
            ("guidance_interval", list(self.guidance_interval), 0 <= low < high <= 1),
            ("control_scale", self.control_scale, 0 <= self.control_scale < inf),
        ):
            if not valid:
                raise UserError(f"`sampler.{name}` cannot be {value}. {_RANGES[name]}")

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Build a sampler from the JSON of `dataclasses.asdict`.

        Raises:
            ValidationError: A field is unknown, or its value is not allowed.
        """
        known = {name: value for name, value in fields.items() if name != "text_scale"}  # which older files have
        return TypeAdapter(cls).validate_python({"spacing": "leading", **known})  # of files older than the field


AUTHORS = Sampler("ddim", steps=50, guidance_scale=1.75, guidance="text", spacing="leading")
_RANGES = {
    "steps": "Give at least 1.",
    "guidance_scale": "Give a number; 1 disables guidance.",
    "best_of": f"Give 1 to {MOST}.",
    "refine.steps": f"Give at most {MOST}.",
    "guidance_interval": "Give two fractions of the noise schedule, such as [0.1, 0.8], the smaller one first.",
    "control_scale": "Give at least 0; the control was trained for 1.",
}


def sample(denoiser: Denoiser, noise: Tensor, schedule: DDIMScheduler, sampler: Sampler) -> Tensor:
    """Sample latents from noise.

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
        raise UserError(f"`sampler.steps` must be at most {longest} for this prior, and is {sampler.steps}.")
    # A solver has state, so each call makes its own. Spacing is explicit: the prior's configuration may say anything.
    spacing = sampler.spacing or SPACINGS[sampler.scheduler]
    solver = SCHEDULERS[sampler.scheduler].from_config(schedule.config, timestep_spacing=spacing)
    solver.set_timesteps(sampler.steps, device=noise.device)
    latents: Tensor = noise * solver.init_noise_sigma
    for timestep in solver.timesteps:
        latents = solver.step(denoiser(latents, timestep), timestep, latents, return_dict=False)[0]
    return latents
