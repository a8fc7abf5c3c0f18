"""Priors that are not supported are refused when they are loaded; every schedule that is accepted can be sampled."""

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.prior import Prior
from featinv_pl.nets.supported import SCHEDULER, read_schedule
from featinv_pl.sampling.diffusion import clean_estimate, denoising_target, timestep_weights
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.sampling.solvers import Step, sample


def edit(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (SCHEDULER, {"prediction_type": "sample"}, "prediction_type is sample.*epsilon and v_prediction"),
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is FlowMatch.*not flow matching"),
        (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "_class_name is EDMEuler.*EDM"),
        (SCHEDULER, {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is True"),
        (SCHEDULER, {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type is cont"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "zero terminal SNR.*v_prediction"),
        ("vae/config.json", {"latent_channels": "4"}, "latent_channels is 4"),
        (SCHEDULER, {"steps_offset": 7}, "does not describe a schedule .steps_offset is 7"),
        ("vae/config.json", {"latents_mean": [0.1, 0.2, 0.3]}, "latents_mean is"),
        (
            "vae/config.json",
            {"latent_channels": 16, "latents_mean": None, "latents_std": None},
            "needs 4 channels and returns 4, but latents .* have 16",
        ),
        ("unet/config.json", {"in_channels": 9}, "needs 9 channels .* as for inpainting"),
        ("unet/config.json", {"out_channels": 8}, "returns 8"),
        ("unet/config.json", {"num_class_embeds": 1000}, "needs classes"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "added embeddings, as Stable Diffusion XL"),
        ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "other embeddings"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "the guidance scale"),
        ("unet/config.json", {"cross_attention_dim": [8, 8]}, "prompts of several widths"),
    ],
)
def test_what_is_not_supported_is_refused(part: str, changes: dict[str, Any], message: str, own_prior: Path) -> None:
    edit(own_prior / part, changes)
    with pytest.raises(UserError, match=rf"^`prior`: .*{message}"):
        Prior(str(own_prior))
    for source in (own_prior, own_prior / "vae"):
        with pytest.raises(UserError, match=rf"^`autoencoder`: .*{message}"):
            LatentAutoencoder.load(str(source))


@pytest.mark.parametrize("solver", list(get_args(get_type_hints(Sampler)["scheduler"])))
@pytest.mark.parametrize(
    "described",
    [
        {},  # Stable Diffusion's
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
        {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"_class_name": "UniPCMultistepScheduler", "beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.02] * 400, "num_train_timesteps": 400, "steps_offset": 0},
        {"prediction_type": "v_prediction", "_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "_class_name": "EulerDiscreteScheduler"},
    ],
)
def test_a_perfect_denoiser_is_sampled_back(described: dict[str, Any], solver: Any, tmp_path: Path) -> None:
    (tmp_path / "scheduler.json").write_text(json.dumps({"set_alpha_to_one": True, **described}))
    schedule = read_schedule(tmp_path / "scheduler.json", "--model.prior")
    goal, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    alphas = schedule.alphas_cumprod.double()

    def perfect(latents: Tensor, step: Step) -> Tensor:
        signal = alphas[step.time]
        hidden = (latents.double() - signal.sqrt() * goal) / (1 - signal).sqrt()
        velocity = signal.sqrt() * hidden - (1 - signal).sqrt() * goal
        prediction: Tensor = velocity if "prediction_type" in described else hidden
        return prediction.to(latents)

    for spacing in (None, "leading", "trailing"):
        for steps in (1, 7, 30):
            sampled = sample(perfect, noise, schedule, Sampler(solver, steps, spacing=spacing))
            # With this spacing, DDIM of diffusers ends at the first timestep of training: what noise is there, stays.
            left = 5 * float(1 - alphas[0]) ** 0.5 if (solver, spacing) == ("ddim", "trailing") else 0
            torch.testing.assert_close(sampled, goal, rtol=0, atol=5e-3 + left)

    timesteps = torch.tensor([0, schedule.config.num_train_timesteps - 1])
    assert timestep_weights(schedule, timesteps, "min-snr").isfinite().all()
    noisy, target = schedule.add_noise(goal, noise, timesteps), denoising_target(schedule, goal, noise, timesteps)
    torch.testing.assert_close(clean_estimate(schedule, noisy, target, timesteps), goal, rtol=0, atol=5e-3)
