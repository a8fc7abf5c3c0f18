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

OPTION = "`autoencoder`"
DECODED_AT_ONCE = 4 * 256**2
"""Pixels. Enough to keep a GPU busy; larger batches would want half a gigabyte more for each image of 256 pixels."""


class LatentAutoencoder(Frozen):
    """A frozen AutoencoderKL."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.latent_channels = int(vae.config.latent_channels)
        self.downsampling = 2 ** (len(vae.config.block_out_channels) - 1)
        self.freeze()

    @classmethod
    def load(cls, source: str) -> Self:
        """Load the autoencoder of a source, refusing one of a prior that is not supported.

        Args:
            source: Its own folder in diffusers' layout (`config.json` and weights), or anything that
                `Prior` takes: only the autoencoder, and the configurations of the rest, are fetched and read.
        """
        if Path(source).is_file():
            state, option = read_weights(Path(source), OPTION), f"{OPTION} '{source}'"
            ldm.check_prior(state, option)
            return cls(ldm.autoencoder(state, option))
        folder = find_folder(source, ["vae/*", "unet/config.json", "scheduler/*"], OPTION)
        if (folder / "vae").is_dir():
            folder /= "vae"
        if folder.name == "vae":
            check_prior(folder.parent, OPTION)
        vae = load_part(AutoencoderKL, folder, OPTION)
        check_autoencoder(vae.config, f"'{folder}'", OPTION)
        return cls(vae)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The moments (B, 2 * channels, H / f, W / f), unscaled, of the latents of images (B, 3, H, W) in [-1, 1]."""
        distribution = self.vae.encode(images).latent_dist
        return torch.cat([distribution.mean, distribution.logvar], dim=1)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample latents from `encode`'s moments, scaled to unit variance as a UNet expects them.

        The noise (B, channels, H / f, W / f) is standard normal; zeros give the mean.
        """
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + torch.exp(log_variance / 2) * noise) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W), about [-1, 1], a few at a time."""
        pixels = latents.shape[-2:].numel() * self.downsampling**2
        parts = (latents / self.scaling_factor).split(max(1, DECODED_AT_ONCE // pixels))
        return torch.cat([self.vae.decode(part).sample for part in parts])
