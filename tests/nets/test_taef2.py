"""Tiny autoencoders: TAEF2 against recorded outputs of the original, and what they share with AutoencoderKL."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from featinv_pl.errors import UserError
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.taef2 import AutoencoderTAEF2

SHARED = Path(__file__).parents[3] / "shared"
WEIGHTS, VECTORS = SHARED / "weights/taef2.safetensors", SHARED / "golden/taef2.safetensors"


@pytest.mark.skipif(not VECTORS.is_file(), reason="the published weights are not here")
def test_computes_what_the_original_computes() -> None:
    autoencoder, recorded = LatentAutoencoder.load(str(WEIGHTS)), load_file(VECTORS)
    images = recorded["images_uint8"].float() / 127.5 - 1
    latents, certain = autoencoder.encode(images).chunk(2, dim=1)
    torch.testing.assert_close(latents, recorded["latents"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(autoencoder.decode(latents), recorded["decoded"], atol=1e-4, rtol=1e-4)
    assert (certain.exp() < 1e-12).all()


def test_a_file_becomes_a_folder_with_the_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(AutoencoderTAEF2().state_dict(), tmp_path / "taef2.safetensors")
    autoencoder = LatentAutoencoder.load(str(tmp_path / "taef2.safetensors"))
    assert not autoencoder.normalised
    moments, zeros = autoencoder.encode(torch.rand(4, 3, 32, 32) * 2 - 1), torch.zeros(4, 32, 4, 4)
    mean, std = moments[:, :32].mean((0, 2, 3)), moments[:, :32].std((0, 2, 3))
    autoencoder.normalise(mean, std)
    autoencoder.vae.save_pretrained(tmp_path / "vae")

    again = LatentAutoencoder.load(str(tmp_path / "vae"))
    assert again.normalised
    assert digest(again) == digest(autoencoder)
    latents = again.sample(moments, zeros)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(32))
    torch.testing.assert_close(again.decode(latents), again.vae.decode(moments[:, :32]).sample)


def test_diffusers_tiny_autoencoder_serves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    tiny.save_pretrained(tmp_path / "vae")
    autoencoder, images = LatentAutoencoder.load(str(tmp_path)), torch.rand(2, 3, 16, 16) * 2 - 1
    latents = autoencoder.sample(autoencoder.encode(images), torch.zeros(2, 4, 4, 4))
    torch.testing.assert_close(latents, (tiny.encode(images).latents - 0.25) * 0.5)
    torch.testing.assert_close(autoencoder.decode(latents), tiny.decode(tiny.encode(images).latents).sample)
    assert (autoencoder.downsampling, autoencoder.latent_channels) == (4, 4)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"_class_name": "AutoencoderDC"}, "holds a AutoencoderDC"),
        ({"latents_mean": [0.0] * 4, "latents_std": None}, "latents_mean is"),
        ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "latents_std is"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "latents_mean is"),
    ],
)
def test_what_is_wrong_is_named(entry: dict[str, object], named: str, prior_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prior_folder / "vae", tmp_path / "vae"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    with pytest.raises(UserError, match=named):
        LatentAutoencoder.load(str(folder))


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"encoder.0.weight": torch.zeros(1), "decoder.1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"tensors of the autoencoder in .* are missing"):
        LatentAutoencoder.load(str(tmp_path / "other.safetensors"))
