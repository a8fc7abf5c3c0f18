"""The prior's autoencoder: between images and the latents that diffusion works on."""

from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from featinv_pl.nets import ldm
from featinv_pl.nets.frozen import Frozen
from featinv_pl.nets.hub import find_folder, load_part
from featinv_pl.nets.supported import check_autoencoder, check_prior
from featinv_pl.nets.weights import read_weights

DECODED_AT_ONCE = 4 * 256**2
"""Pixels. Enough to keep a GPU busy; larger batches would want half a gigabyte more for each image of 256 pixels."""


class LatentAutoencoder(Frozen):
    """A frozen AutoencoderKL."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(self.vae.config.scaling_factor)
        self.latent_channels = int(self.vae.config.latent_channels)
        self.downsampling = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.freeze()

    @classmethod
    def load(cls, source: str, option: str = "`autoencoder`") -> Self:
        """Load the autoencoder of a source, refusing one of a prior that is not supported.

        Args:
            source: Its own folder in diffusers' layout (`config.json` and weights), or anything that
                `Prior` takes: only the autoencoder, and the configurations of the rest, are fetched and read.
            option: The argument that named the source, for errors.
        """
        if Path(source).is_file():
            state = read_weights(Path(source), option)
            ldm.check_prior(state, f"{option} '{source}'")
            return cls(ldm.autoencoder(state, f"{option} '{source}'"))
        folder = find_folder(source, ["vae/*", "unet/config.json", "scheduler/*"], option)
        if (folder / "vae").is_dir():
            folder /= "vae"
        if folder.name == "vae":
            check_prior(folder.parent, option)
        vae = load_part(AutoencoderKL, folder, option)
        check_autoencoder(vae.config, f"'{folder}'", option)
        return cls(vae)

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
        """Sample latents from their moments, scaled to unit variance as a UNet expects them.

        Args:
            moments: (B, 2 * channels, H / f, W / f), as `encode` returns them.
            noise: (B, channels, H / f, W / f), standard normal; zeros give the mean.
        """
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + torch.exp(log_variance / 2) * noise) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W), about [-1, 1], a few at a time."""
        pixels = latents.shape[-2:].numel() * self.downsampling**2
        parts = (latents / self.scaling_factor).split(max(1, DECODED_AT_ONCE // pixels))
        return torch.cat([self.vae.decode(part).sample for part in parts])
