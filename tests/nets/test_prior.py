"""The frozen prior, its autoencoder, and the control that starts as no control at all."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from featinv_pl.errors import UserError
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.control import WEIGHTS, Encoder, FeatureControl, FeatureEncoder
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.prior import PROMPTS, Prior

CHANNELS = 6


@pytest.fixture
def prior(prior_folder: Path) -> Prior:
    return Prior(str(prior_folder))


@pytest.fixture
def control(prior: Prior) -> FeatureControl:
    return FeatureControl(prior.unet, CHANNELS, Encoder(hidden_channels=8))


def perturb(network: torch.nn.Module) -> None:
    """Stand in for training: every weight moves, so that nothing is zero."""
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


def predict(prior: Prior, control: FeatureControl | None, features: Tensor) -> Tensor:
    """A prediction for fixed noisy latents, steered by feature maps."""
    rng = torch.Generator().manual_seed(3)
    latents = torch.randn(len(features), 4, 4, 4, generator=rng)
    timesteps = torch.arange(1, len(features) + 1) * 300
    prompts = torch.randn(len(features), 2, 8, generator=rng)  # with one token, attention has no choice
    if control is None:
        return prior.predict(latents, timesteps, prompts)
    residuals = control(latents, timesteps, prompts, control.encoder(features, (4, 4)))
    return prior.predict(latents, timesteps, prompts, residuals)


# Autoencoder


@pytest.fixture
def autoencoder(own_prior: Path) -> LatentAutoencoder:
    """One whose scaling factor is not 1."""
    config = json.loads((own_prior / "vae/config.json").read_text())
    (own_prior / "vae/config.json").write_text(
        json.dumps({**config, "scaling_factor": 0.25, "latents_mean": None, "latents_std": None})
    )
    return LatentAutoencoder.load(str(own_prior / "vae"))


def test_autoencoder_goes_there_and_back(autoencoder: LatentAutoencoder, prior_folder: Path) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    theirs = AutoencoderKL.from_pretrained(prior_folder / "vae")
    moments = autoencoder.encode(images.clone().requires_grad_())
    distribution = theirs.encode(images).latent_dist
    torch.testing.assert_close(moments, torch.cat([distribution.mean, distribution.logvar], dim=1))
    assert moments.shape == (2, 8, 4, 4)
    assert not moments.requires_grad
    decoded = autoencoder.decode(autoencoder.sample(moments, torch.zeros(2, 4, 4, 4)))
    torch.testing.assert_close(decoded, theirs.decode(distribution.mean).sample)
    assert decoded.shape == images.shape
    noise, variance = torch.randn(2, 4, 4, 4), moments[:, 4:].exp()
    torch.testing.assert_close(autoencoder.sample(moments, noise), 0.25 * (moments[:, :4] + variance.sqrt() * noise))


def test_images_are_decoded_a_few_at_a_time(autoencoder: LatentAutoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(5, 4, 4, 4)
    whole = autoencoder.decode(latents)
    sizes: list[int] = []
    autoencoder.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for pixels, expected in ((2 * 32 * 32, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr("featinv_pl.nets.autoencoder.DECODED_AT_ONCE", pixels)
        torch.testing.assert_close(autoencoder.decode(latents), whole)
        assert sizes == expected
        sizes.clear()


# Control


def test_untrained_control_leaves_the_prior_as_it_is(prior: Prior, control: FeatureControl) -> None:
    features = torch.randn(3, CHANNELS, 2, 2)
    assert torch.equal(predict(prior, control, features), predict(prior, None, features))
    unet = prior.unet.state_dict()  # of which the control starts as a copy
    shared = {name: weight for name, weight in control.controlnet.state_dict().items() if name in unet}
    assert {name.split(".")[0] for name in shared} >= {"conv_in", "time_embedding", "down_blocks", "mid_block"}
    assert all(torch.equal(weight, unet[name]) for name, weight in shared.items())
    assert all(weight.data_ptr() != unet[name].data_ptr() for name, weight in shared.items())


def test_trained_control_steers_by_the_map(prior: Prior, control: FeatureControl) -> None:
    perturb(control)
    prior.train()
    features = torch.randn(3, CHANNELS, 2, 2)
    steered = predict(prior, control, features)
    assert not torch.allclose(steered, predict(prior, None, features), atol=1e-3)
    turned = predict(prior, control, features.flip(-1))
    assert all(not torch.allclose(one, other, atol=1e-3) for one, other in zip(steered, turned, strict=True))
    # Gradients reach all of the control, and nothing else.
    steered.square().mean().backward()
    assert [name for name, one in control.named_parameters() if one.grad is None or not one.grad.any()] == []
    assert all(parameter.grad is None for parameter in prior.parameters())
    assert not any(module.training for module in prior.modules())


def test_training_can_start_from_zero(prior: Prior, control: FeatureControl) -> None:
    optimizer = torch.optim.SGD(control.parameters(), lr=1.0)
    features = torch.randn(3, CHANNELS, 2, 2)
    start = {name: weight.detach().clone() for name, weight in control.named_parameters()}
    for _ in range(4):  # zero layers stand in a row, and each lets the gradient through once it has moved
        optimizer.zero_grad()
        predict(prior, control, features).square().mean().backward()
        optimizer.step()
    assert [name for name, weight in control.named_parameters() if torch.equal(weight, start[name])] == []


@pytest.mark.parametrize("num_layers", [2, 5])
def test_encoder_upsamples_then_convolves(num_layers: int) -> None:
    encoder = FeatureEncoder(CHANNELS, 5, hidden_channels=7, num_layers=num_layers)
    features = torch.randn(2, CHANNELS, 2, 3)
    assert not encoder(features, (4, 8)).any()
    perturb(encoder)
    hidden, weights = functional.interpolate(features, (4, 8), mode="bilinear"), list(encoder.parameters())
    for number, (weight, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
        hidden = functional.conv2d(functional.silu(hidden) if number else hidden, weight, bias, padding=1)
    assert hidden.shape == (2, 5, 4, 8)
    assert len(weights) == 2 * num_layers
    torch.testing.assert_close(encoder(features, (4, 8)), hidden)
    with pytest.raises(UserError, match=r"`encoder\.num_layers` cannot be 1\. Give at least 2"):
        Encoder(num_layers=1)


# Prior


def test_prior_holds_what_its_folder_says(own_prior: Path) -> None:
    stored = {"prompt": torch.randn(2, 8), "empty": torch.randn(2, 8)}
    save_file(stored, own_prior / PROMPTS)
    prior = Prior(str(own_prior))
    assert torch.equal(prior.prompt, stored["prompt"])
    assert torch.equal(prior.empty, stored["empty"])
    assert prior.num_timesteps == 1000
    assert prior.latent_shape(torch.zeros(5, 8, 3, 2)) == (4, 3, 2)
    weights = load_file(own_prior / "unet" / WEIGHTS)
    assert all(torch.equal(weight, weights[name]) for name, weight in prior.unet.state_dict().items())


def test_reads_the_layout_of_older_folders(own_prior: Path) -> None:
    """A pickle of tensors, attention under its former names, and the configuration of another scheduler."""
    new = Prior(str(own_prior))
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(own_prior / "vae" / WEIGHTS)
    renamed = {}
    for name, value in weights.items():
        for now, then in former.items():
            name = name.replace(f".{now}.", f".{then}.")
        renamed[name] = value
    assert renamed.keys() != weights.keys()
    torch.save(renamed, own_prior / "vae" / Path(WEIGHTS).with_suffix(".bin"))
    (own_prior / "vae" / WEIGHTS).unlink()
    schedule = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True}
    schedule |= {"clip_sample": True}  # which is for images, and would ruin latents
    schedule |= {"use_karras_sigmas": True, "thresholding": True}  # how others sample
    (own_prior / "scheduler/scheduler_config.json").write_text(json.dumps(schedule))

    old = Prior(str(own_prior))
    assert digest(old.autoencoder) == digest(new.autoencoder)
    for name in ("clip_sample", "steps_offset", "set_alpha_to_one", "beta_schedule", "prediction_type"):
        assert old.schedule.config[name] == new.schedule.config[name]
    assert torch.equal(old.schedule.alphas_cumprod, new.schedule.alphas_cumprod)


@pytest.mark.parametrize(
    ("part", "weight", "message"),
    [
        ("unet/config.json", None, r"there is no file '.*prior/unet/config\.json'"),
        ("scheduler/scheduler_config.json", None, "there is no file '.*scheduler/scheduler_config.json'"),
        (PROMPTS, None, f"'.*' has neither {PROMPTS} nor both text_encoder/ and tokenizer/"),
        (f"unet/{WEIGHTS}", "mid_block.resnets.0.norm1.bias", r"'.*unet' lacks 1 weights .*such as mid_block\.resnets"),
        (f"vae/{WEIGHTS}", "quant_conv.bias", r"'.*vae' lacks 1 weights .*such as quant_conv\.bias"),
    ],
)
def test_names_what_is_missing(part: str, weight: str | None, message: str, own_prior: Path) -> None:
    if weight:
        weights = load_file(own_prior / part)
        del weights[weight]
        save_file(weights, own_prior / part)
    else:
        (own_prior / part).unlink()
    with pytest.raises(UserError, match=f"`prior`: {message}"):
        Prior(str(own_prior))
