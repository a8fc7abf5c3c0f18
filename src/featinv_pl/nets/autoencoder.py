"""The prior's autoencoder: between images and the latents that diffusion works on."""

import copy
from pathlib import Path
from typing import Any, Final, Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.files import read_json
from featinv_pl.nets import ldm
from featinv_pl.nets.frozen import Frozen
from featinv_pl.nets.hub import find_folder, load_part
from featinv_pl.nets.supported import ADVICE, check_autoencoder, check_prior
from featinv_pl.nets.taef2 import AutoencoderTAEF2, is_taef2
from featinv_pl.nets.weights import fill, read_weights

OPTION = "`autoencoder`"
DECODED_AT_ONCE = 4 * 256**2
"""Pixels. Enough to keep a GPU busy; larger batches would want half a gigabyte more for each image of 256 pixels."""
KINDS: Final = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, AutoencoderTAEF2)}
CERTAIN = -30.0  # the log-variance of latents that are not sampled: AutoencoderKL's smallest


class LatentAutoencoder(Frozen):
    """A frozen autoencoder: diffusers' AutoencoderKL or AutoencoderTiny (TAESD), or TAEF2.

    Latents are normalised by `latents_mean` and `latents_std` of its configuration, one value for each channel;
    otherwise by its `shift_factor` and `scaling_factor`.

    Attributes:
        normalised: Whether the configuration says how; TAEF2's does once a prior was trained on it.
        downsampling: Pixels of a side that make one location of the latents.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny | AutoencoderTAEF2) -> None:
        super().__init__()
        self.vae, config = vae, vae.config
        self.latent_channels = int(config.latent_channels)
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.normalised = bool(config.get("latents_std")) or "scaling_factor" in config
        shift, scale = [config.get("shift_factor") or 0.0], [config.get("scaling_factor", 1.0)]
        if config.get("latents_std"):
            shift, scale = config["latents_mean"], [1 / value for value in config["latents_std"]]
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1), persistent=False)
        self.freeze()

    @classmethod
    def load(cls, source: str, option: str = OPTION) -> Self:
        """Load the autoencoder of a source, refusing one of a prior that is not supported.

        Args:
            source: Its own folder in diffusers' layout (`config.json` and weights), the file of TAEF2, or anything that
                `Prior` takes: only the autoencoder, and the configurations of the rest, are fetched and read.
            option: The argument that named the source, for errors.
        """
        if Path(source).is_file():
            state, what = read_weights(Path(source), option), f"{option} '{source}'"
            if is_taef2(state):
                taef2 = AutoencoderTAEF2()
                fill(taef2, state, f"autoencoder in '{source}'", option)
                return cls(taef2)
            ldm.check_prior(state, what)
            return cls(ldm.autoencoder(state, what))
        folder = find_folder(source, ["vae/*", "unet/config.json", "scheduler/*"], option)
        if (folder / "vae").is_dir():
            folder /= "vae"
        if folder.name == "vae":
            check_prior(folder.parent, option)
        return cls.load_folder(folder, option)

    @classmethod
    def load_folder(cls, folder: Path, option: str) -> Self:
        """Load an autoencoder from its own folder, by the class that its configuration names."""
        config = read_json(folder / "config.json", option, ADVICE)
        check_autoencoder(config, f"'{folder}'", option)
        name = str(config.get("_class_name", AutoencoderKL.__name__))
        if name not in KINDS:
            raise UserError(f"{option}: '{folder}' holds a {name}. Supported are {', '.join(KINDS)}.")
        return cls(load_part(KINDS[name], folder, option))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The moments of the latents of images (B, 3, H, W) in [-1, 1]; a tiny autoencoder's have no variance.

        Returns:
            (B, 2 * channels, H / f, W / f): mean, then log-variance, not normalised.
        """
        encoded: Any = self.vae.encode(images)
        if isinstance(self.vae, AutoencoderKL):
            return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.logvar], dim=1)
        return torch.cat([encoded.latents, torch.full_like(encoded.latents, CERTAIN)], dim=1)

    def rounding(self, images: Tensor) -> float:
        """How far off bfloat16 encodes images, in standard deviations of what latents are sampled from.

        A root mean square; infinite where nothing is sampled.
        """
        if not isinstance(self.vae, AutoencoderKL):
            return float("inf")
        mean, log_variance = self.encode(images).chunk(2, dim=1)
        rounded = LatentAutoencoder(copy.deepcopy(self.vae).bfloat16()).encode(images.bfloat16()).chunk(2, dim=1)[0]
        return float(((rounded.float() - mean) * torch.exp(-log_variance / 2)).square().mean().sqrt())

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample latents from `encode`'s moments, normalised as a UNet expects them.

        The noise (B, channels, H / f, W / f) is standard normal; zeros give the mean.
        """
        mean, log_variance = moments.chunk(2, dim=1)
        return (mean + torch.exp(log_variance / 2) * noise - self.shift.to(mean)) * self.scale.to(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents to images (B, 3, H, W), about [-1, 1], a few at a time."""
        pixels = latents.shape[-2:].numel() * self.downsampling**2
        unscaled = latents / self.scale.to(latents) + self.shift.to(latents)
        parts = unscaled.split(max(1, DECODED_AT_ONCE // pixels))
        return torch.cat([self.vae.decode(part).sample for part in parts])

    def check_latents_of(self, other: "LatentAutoencoder", option: str) -> None:
        """Refuse another autoencoder than one for the same latents, as far as their shape tells."""
        ours, theirs = ((one.latent_channels, one.downsampling) for one in (self, other))
        if ours != theirs:
            raise UserError(
                f"{option}: its latents have {ours[0]} channels at 1/{ours[1]} of the image's side, and the prior's "
                f"{theirs[0]} at 1/{theirs[1]}. Give a decoder of the prior's latents, such as madebyollin/taesd for "
                "Stable Diffusion 1, or fit a TinyAutoencoder."
            )

    @property
    def normalisation(self) -> dict[str, Any]:
        """How latents are normalised, as JSON values, for the identity of an inverter."""
        if len(self.scale) == 1 and not self.shift.any():
            return {"scaling_factor": float(self.vae.config.scaling_factor)}
        return {"latents_scale": self.scale.flatten().tolist(), "latents_shift": self.shift.flatten().tolist()}

    def normalise(self, mean: Tensor, std: Tensor) -> None:
        """Normalise latents by their mean and standard deviation (channels,), also where this is saved and loaded."""
        self.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        self.shift, self.scale = mean.view(-1, 1, 1), std.reciprocal().view(-1, 1, 1)
        self.normalised = True
