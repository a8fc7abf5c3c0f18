"""The prior's autoencoder: between images and the latents that diffusion works on."""

from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.nets.frozen import Frozen

Part = TypeVar("Part", UNet2DConditionModel, AutoencoderKL)


class LatentAutoencoder(Frozen):
    """A frozen AutoencoderKL.

    Args:
        folder: A folder in diffusers' layout: `config.json` and safetensors.
        option: The option that named the folder, for errors.
    """

    def __init__(self, folder: str | Path, option: str = "--model.autoencoder") -> None:
        super().__init__()
        self.vae = load_part(AutoencoderKL, Path(folder), option)
        self.scaling_factor = float(self.vae.config.scaling_factor)
        self.latent_channels = int(self.vae.config.latent_channels)
        self.freeze()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images to the moments of their latents.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            (B, 2 * channels, H / f, W / f): mean, then log-variance, unscaled.
        """
        distribution = self.vae.encode(images).latent_dist
        return torch.cat([distribution.mean, distribution.logvar], dim=1)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draw latents from their moments, scaled to unit variance as a UNet expects them.

        Args:
            moments: (B, 2 * channels, H / f, W / f), as `encode` returns them.
            noise: (B, channels, H / f, W / f), standard normal; zeros give the mean.
        """
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + torch.exp(log_variance / 2) * noise) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W), about [-1, 1]."""
        images: Tensor = self.vae.decode(latents / self.scaling_factor).sample
        return images


def load_part(kind: type[Part], folder: Path, option: str) -> Part:
    """Load one diffusers network from safetensors, refusing a file in which weights are missing."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{option}: '{folder}' holds no config.json. Give a folder in diffusers' layout, "
            f"with config.json and safetensors of a {kind.__name__}."
        )
    try:
        network, report = kind.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{option}: '{folder}' could not be loaded as {kind.__name__}: {reason}") from error
    if report["missing_keys"]:
        raise UserError(
            f"{option}: '{folder}' lacks {len(report['missing_keys'])} weights of {kind.__name__}, "
            f"such as {report['missing_keys'][0]}. The file is damaged or of another architecture."
        )
    loaded: Part = network
    return loaded
