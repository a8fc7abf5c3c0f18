"""How reconstructions are sampled: settings that check themselves, and import no torch."""

from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, TypeAdapter

from featinv_pl.errors import UserError

MOST = 1000  # candidates or gradient steps, each of which takes its time
FRACTIONS = "Give two fractions of the noise schedule, such as [0.1, 0.8], the smaller one first."
TENTH = "0.1 is a tenth of the latents' spread"
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Refinement:
    """Gradient steps towards the target map, through the classifier itself.

    At each denoising step the estimate of the clean latents is decoded and classified, and moved against the
    gradient of its map's distance to the target (guidance by a clean estimate, as in FreeDoM, arXiv 2303.09833,
    and in arXiv 2509.07936). The gradient passes through autoencoder and backbone, not through the prior.
    The defaults suit a trained control; without one it takes larger steps at all levels of noise, such as 5 of 0.1.

    Args:
        steps: Gradient steps at each denoising step.
        step_size: How far a gradient step moves latents of unit variance: the root mean square of their change.
        distance: What is decreased: 1 - cosine, mean over locations, or `l2`, the squared error relative to
            the target's square.
        interval: Where, in fractions of the noise schedule: 0 is the clean end, 1 pure noise.
        target: The cosine at which an image is left as it is.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    steps: int = 3
    step_size: float = 0.02
    distance: Literal["cosine", "l2"] = "cosine"
    interval: tuple[float, float] = (0.0, 0.3)
    target: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.interval
        check_option("sampler.refine.steps", self.steps, 1 <= self.steps <= MOST, f"Give 1 to {MOST}.")
        check_option("sampler.refine.step_size", self.step_size, self.step_size > 0, f"Give a number above 0; {TENTH}.")
        check_option("sampler.refine.interval", list(self.interval), 0 <= low < high <= 1, FRACTIONS)
        check_option("sampler.refine.target", self.target, -1 <= self.target <= 1, "Give a cosine, from -1 to 1.")


@dataclass(frozen=True)
class Sampler:
    """How reconstructions are sampled. docs/better.md measured the defaults; `AUTHORS` are the authors' settings.

    Args:
        scheduler: `ddim`, `dpm` (DPM-Solver++) or `unipc`, all from diffusers.
        steps: Number of denoising steps, from 1.
        spacing: How the steps are placed in the noise schedule (Lin et al., arXiv 2305.08891, table 2): `leading`
            never visits its noisiest end, `trailing` starts there, `linspace` visits both ends. None is `leading`
            for `ddim` and `linspace` for the others.
        guidance_scale: Guidance scale; 1 disables guidance and halves the cost.
        guidance: What the unconditional branch drops: `text` only the prompt, as in the authors' code, `features`
            the feature map too, which is the pair that training uses.
        guidance_interval: Where guidance acts, in fractions of the noise schedule: 0 is the clean end.
        guidance_every: At which steps the unconditional branch is computed: every one, every second and so on. In
            between, guidance goes on in its last direction, at half the cost.
        control_scale: Multiplies the control's residuals. 0 is the bare prior: with `refine`, inversion without
            any training.
        control_every: At which steps the control is computed. In between, its last residuals are used.
        refine: Gradient steps towards the feature map between the denoising steps.
        best_of: Number of candidates, of which the one with the most similar feature map is kept.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    scheduler: Literal["ddim", "dpm", "unipc"] = "dpm"
    steps: int = 15
    guidance_scale: float = 1.5
    guidance: Literal["text", "features"] = "features"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    control_scale: float = 1.0
    refine: Refinement | None = None
    best_of: int = 1
    spacing: Literal["leading", "trailing", "linspace"] | None = None
    guidance_every: int = 1
    control_every: int = 1

    def __post_init__(self) -> None:
        scale, control, (low, high) = self.guidance_scale, self.control_scale, self.guidance_interval
        check_option("sampler.steps", self.steps, self.steps >= 1, "Give at least 1.")
        check_option("sampler.guidance_scale", scale, isfinite(scale), "Give a number; 1 disables guidance.")
        check_option("sampler.guidance_interval", list(self.guidance_interval), 0 <= low < high <= 1, FRACTIONS)
        check_option("sampler.control_scale", control, 0 <= control < inf, "Give at least 0; it was trained for 1.")
        for name, number in (("guidance_every", self.guidance_every), ("control_every", self.control_every)):
            check_option(f"sampler.{name}", number, number >= 1, "Give 1 for every step, 2 for every second one.")
        check_option("sampler.best_of", self.best_of, 1 <= self.best_of <= MOST, f"Give 1 to {MOST}.")

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Build a sampler from the JSON of `asdict`; pydantic's ValidationError tells of an unknown or wrong field."""
        known = {name: value for name, value in fields.items() if name != "text_scale"}  # which older files have
        return TypeAdapter(cls).validate_python(known)


def check_option(name: str, value: object, valid: bool, advice: str) -> None:
    """Refuse the value of an option."""
    if not valid:
        raise UserError(f"`{name}` cannot be {value}. {advice}")


AUTHORS = Sampler("ddim", steps=50, guidance_scale=1.75, guidance="text", spacing="leading")
