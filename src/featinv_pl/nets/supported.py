"""Which priors there is support for, told by their configurations, before hours are spent on them.

Supported are latent diffusion models of Stable Diffusion's kind: a UNet whose input is the noisy latents alone and
whose only condition is a prompt, trained to predict the noise or the velocity on a variance-preserving schedule.
For errors, `what` is where a configuration comes from, and `option` named it.
"""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Final

from diffusers import DDIMScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers

from featinv_pl.errors import UserError
from featinv_pl.files import read_json

MOST_TIMESTEPS = 100_000  # of a schedule, whose tables have as many entries; usual are 1,000
PREDICTIONS = ("epsilon", "v_prediction")
ZERO_SIGNAL = 1e-12  # of the last timestep's share of signal: with less, noise says nothing of the image
SCHEDULER = "scheduler/scheduler_config.json"
ADVICE = "Download or copy the prior again."

# Stable Diffusion 1's. The defaults of diffusers' scheduler differ in three of these.
SCHEDULE: Final = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
# What a configuration may say of training and of the ends of sampling. The rest is how others sample.
TRAINED: Final = (SCHEDULE.keys() | {"trained_betas", "rescale_betas_zero_snr"}) - {"clip_sample"}

# Solvers whose priors were trained on such a schedule; others are of flow matching, of EDM, or of one-step models.
SCHEDULERS: Final = KarrasDiffusionSchedulers.__members__.keys() - {"EDMEulerScheduler"}

# What else a UNet needs as input.
CONDITIONS: Final = {
    "class_embed_type": "classes",
    "num_class_embeds": "classes",
    "addition_embed_type": "added embeddings, as Stable Diffusion XL",
    "encoder_hid_dim_type": "other embeddings than a text encoder's",
    "time_cond_proj_dim": "the guidance scale, as distilled models",
}


def check_prior(folder: Path, option: str) -> None:
    """Refuse a prior in diffusers' layout that is not supported; parts of it may be missing."""
    vae, unet, scheduler = folder / "vae/config.json", folder / "unet/config.json", folder / SCHEDULER
    if vae.is_file():
        channels = check_autoencoder(read_json(vae, option, ADVICE), f"'{vae.parent}'", option)
        if unet.is_file():
            check_unet(read_json(unet, option, ADVICE), channels, f"'{unet.parent}'", option)
    if scheduler.is_file():
        read_schedule(scheduler, option)


def check_autoencoder(config: Mapping[str, Any], what: str, option: str) -> int:
    """Refuse an autoencoder whose configuration is damaged; return how many channels its latents have."""
    channels = config.get("latent_channels", 4)
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    for name, value, valid in (
        ("latent_channels", channels, isinstance(channels, int)),
        ("latents_mean", mean, (mean is None) is (std is None) and _are_numbers(mean, channels)),
        ("latents_std", std, _are_numbers(std, channels) and all(value > 0 for value in std or [])),
    ):
        if not valid:
            raise UserError(
                f"{option}: the configuration of {what} is damaged ({name} is {str(value)[:100]}). {ADVICE}"
            )
    return int(channels)


def _are_numbers(values: Any, count: Any) -> bool:
    """Whether values are absent, or as many finite numbers."""
    return values is None or (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(value, int | float) and isfinite(value) for value in values)
    )


def check_unet(config: Mapping[str, Any], channels: int, what: str, option: str) -> None:
    """Refuse a UNet that needs more than noisy latents of as many channels and a prompt."""
    given, returned = (config.get(name, 4) for name in ("in_channels", "out_channels"))
    needed = next((condition for name, condition in CONDITIONS.items() if config.get(name) is not None), None)
    if (given, returned) != (channels, channels):
        needed = f"{given} channels and returns {returned}, but latents of its autoencoder have {channels}"
        needed += ", as for inpainting" if given == 2 * channels + 1 else ""
    elif not isinstance(config.get("cross_attention_dim", 1280), int):
        needed = "prompts of several widths"
    if needed:
        raise UserError(
            f"{option}: the UNet of {what} needs {needed}. Supported are UNets whose input is latents alone and whose "
            "only condition is a prompt, such as those of Stable Diffusion 1 and 2."
        )


def read_schedule(path: Path, option: str) -> DDIMScheduler:
    """The noise schedule of a prior's `scheduler_config.json`, whichever supported scheduler it is of.

    What a configuration leaves out is Stable Diffusion's: older ones do, and DDIM's own defaults differ. How it would
    have latents sampled is left out: the sampler says so.
    """
    config = read_json(path, option, "Give a complete prior in diffusers' layout.")
    for name, valid in (
        ("prediction_type", config.get("prediction_type", "epsilon") in PREDICTIONS),
        ("_class_name", str(config.get("_class_name", "DDIMScheduler")) in SCHEDULERS),
        ("use_flow_sigmas", not config.get("use_flow_sigmas")),
        ("timestep_type", config.get("timestep_type") != "continuous"),
    ):
        if not valid:
            raise UserError(
                f"{option}: '{path}' is of a prior that is not supported ({name} is {config[name]}). Supported are the "
                f"prediction types {' and '.join(PREDICTIONS)} on the schedules of DDIM, DDPM, PNDM, Euler, DPM-Solver "
                "and UniPC; not flow matching, EDM, distilled models, or priors that predict the sample."
            )
    try:
        if not 3 <= config.get("num_train_timesteps", 3) <= MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps is {config['num_train_timesteps']:g}")
        if config.get("steps_offset", 0) not in (0, 1):
            raise ValueError(f"steps_offset is {config['steps_offset']}, and can be 0 or 1")
        schedule = DDIMScheduler.from_config(SCHEDULE | {name: config[name] for name in TRAINED & config.keys()})
        if not schedule.alphas_cumprod.isfinite().all():
            raise ValueError("its noise is not finite")
    # Of a hostile configuration diffusers and torch raise any of these; an unknown schedule is a RuntimeError, too.
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise UserError(f"{option}: '{path}' does not describe a schedule ({error}). {ADVICE}") from error
    if schedule.config.prediction_type == "epsilon" and schedule.alphas_cumprod[-1] < ZERO_SIGNAL:
        raise UserError(
            f"{option}: '{path}' ends in pure noise (zero terminal SNR), of which a predicted noise says nothing. "
            "Supported is v_prediction there; or set rescale_betas_zero_snr to false if the prior was trained so."
        )
    return schedule
