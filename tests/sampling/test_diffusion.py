"""The algebra of a noise schedule, against its definitions and diffusers' own schedulers."""

import pytest
import torch
from schedules import make_schedule

from featinv_pl.sampling.diffusion import clean_estimate, denoising_target, implied_prediction, min_snr_weights

PREDICTIONS = ["epsilon", "v_prediction"]


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_prediction_implies_the_clean_latents(prediction_type: str) -> None:
    schedule = make_schedule(prediction_type=prediction_type)
    clean, noise = torch.randn(2, 5, 4, 3, 3).unbind(0)
    timesteps = torch.tensor([0, 1, 500, 900, 999])
    noisy = schedule.add_noise(clean, noise, timesteps)
    target = denoising_target(schedule, clean, noise, timesteps)
    torch.testing.assert_close(clean_estimate(schedule, noisy, target, timesteps), clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(implied_prediction(schedule, noisy, clean, timesteps), target, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_estimate_is_that_of_the_scheduler(prediction_type: str) -> None:
    schedule = make_schedule(prediction_type=prediction_type)
    schedule.set_timesteps(10)
    noisy, prediction = torch.randn(2, 3, 4, 2, 2).unbind(0)
    timestep = schedule.timesteps[4]
    theirs = schedule.step(prediction, timestep, noisy).pred_original_sample
    ours = clean_estimate(schedule, noisy, prediction, timestep)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_velocity_and_noise_weights_are_those_of_the_paper() -> None:
    timesteps = torch.tensor([0, 300, 999])
    alphas = make_schedule(prediction_type="epsilon").alphas_cumprod[timesteps]
    ratio = alphas / (1 - alphas)
    assert ratio[0] > 5 > ratio[2]
    cut = torch.minimum(ratio, torch.tensor(5.0))
    for prediction_type, expected in (("epsilon", cut / ratio), ("v_prediction", cut / (ratio + 1))):
        weights = min_snr_weights(make_schedule(prediction_type=prediction_type), timesteps, 5.0)
        torch.testing.assert_close(weights, expected)
