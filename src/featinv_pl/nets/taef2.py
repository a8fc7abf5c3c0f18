"""TAEF2: the tiny autoencoder of FLUX.2's latents (madebyollin, MIT), which diffusers cannot load yet."""

from pathlib import Path
from typing import Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from featinv_pl.nets.weights import fill, read_weights

WIDTH, POOLED, LATENT_CHANNELS = 64, 256, 32
BOUND = 3.0  # of the decoder's input


class TinyAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Encodes images to latents of an eighth of their side, deterministically, and decodes them.

    Args:
        shift: Mean of each latent channel over a data set, subtracted before scaling; empty for zeros.
        scale: Standard deviation of each latent channel, by which latents are divided; empty for ones.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, shift: tuple[float, ...] = (), scale: tuple[float, ...] = ()) -> None:
        super().__init__()
        encoder: list[nn.Module] = [_convolution(3), Block()]
        for stage in range(3):
            encoder += [_convolution(bias=False, stride=2), *(Block(pooled=stage == 2) for _ in range(3))]
        decoder: list[nn.Module] = [Bound(), nn.Conv2d(LATENT_CHANNELS, WIDTH, 3, padding=1), nn.ReLU()]
        decoder += [Block(pooled=True) for _ in range(3)]
        for blocks in (3, 3, 1):
            decoder += [nn.Upsample(scale_factor=2), _convolution(bias=False), *(Block() for _ in range(blocks))]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(WIDTH, LATENT_CHANNELS, 3, padding=1))
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(WIDTH, 3, 3, padding=1))

    @classmethod
    def from_file(cls, path: Path, option: str) -> Self:
        """Load the published file, whose tensors are named by their place in the two sequences.

        Args:
            path: `taef2.safetensors`.
            option: The argument that named it, for errors.

        Raises:
            UserError: It holds other tensors.
        """
        model = cls()
        fill(model, read_weights(path, option), f"autoencoder in '{path}'", option)
        return model

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to latents (B, 32, H / 8, W / 8), not normalised."""
        latents: Tensor = self.encoder((images + 1) / 2)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, 32, h, w), not normalised, to images (B, 3, 8h, 8w), about [-1, 1]."""
        images: Tensor = self.decoder(latents)
        return 2 * images - 1


class Block(nn.Module):
    """Three convolutions with a skip connection, after a pooled branch in the stages at latent resolution."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_convolution(), nn.ReLU(), _convolution(), nn.ReLU(), _convolution())
        self.pool: nn.Module | None = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, POOLED, 1, bias=False),
                nn.GroupNorm(4, POOLED),
                nn.ReLU(),
                nn.Conv2d(POOLED, WIDTH, 1, bias=False),
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, 64, h, w) to the same shape."""
        if self.pool is not None:
            inputs = inputs + self.pool(inputs)
        return functional.relu(self.conv(inputs) + inputs)


class Bound(nn.Module):
    """Bounds latents softly, as the decoder was trained."""

    def forward(self, latents: Tensor) -> Tensor:
        """Map any value to (-3, 3)."""
        return BOUND * torch.tanh(latents / BOUND)


def _convolution(in_channels: int = WIDTH, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, WIDTH, 3, stride, padding=1, bias=bias)
