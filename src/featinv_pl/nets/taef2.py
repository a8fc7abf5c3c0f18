"""TAEF2: the tiny autoencoder of FLUX.2's latents (madebyollin, MIT), whose pooled blocks diffusers lacks."""

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn
from torch.nn import functional

WIDTH, POOLED, LATENT_CHANNELS, STAGES = 64, 256, 32, 3
BOUND = 3.0  # of the decoder's input


class AutoencoderTAEF2(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Encodes images to latents of an eighth of their side, deterministically, and decodes them.

    The weights are those of the published `taef2.safetensors`, whose tensors are named by their place in two sequences.

    Args:
        latents_mean: Mean of each of the 32 latent channels over a data set; None if it has not been measured.
        latents_std: Standard deviation of each latent channel.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latents_mean: list[float] | None = None, latents_std: list[float] | None = None) -> None:
        super().__init__()
        self.register_to_config(latent_channels=LATENT_CHANNELS, block_out_channels=[WIDTH] * (STAGES + 1))
        encoder: list[nn.Module] = [_convolution(3), Block()]
        for stage in range(STAGES):
            encoder += [_convolution(bias=False, stride=2), *(Block(pooled=stage == STAGES - 1) for _ in range(3))]
        decoder: list[nn.Module] = [Bound(), nn.Conv2d(LATENT_CHANNELS, WIDTH, 3, padding=1), nn.ReLU()]
        decoder += [Block(pooled=True) for _ in range(3)]
        for blocks in (3, 3, 1):
            decoder += [nn.Upsample(scale_factor=2), _convolution(bias=False), *(Block() for _ in range(blocks))]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(WIDTH, LATENT_CHANNELS, 3, padding=1))
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(WIDTH, 3, 3, padding=1))

    def encode(self, images: Tensor) -> AutoencoderTinyOutput:
        """Encode images (B, 3, H, W) in [-1, 1] to latents (B, 32, H / 8, W / 8), not normalised."""
        return AutoencoderTinyOutput(latents=self.encoder((images + 1) / 2))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Decode latents (B, 32, h, w), not normalised, to images (B, 3, 8h, 8w), about [-1, 1]."""
        return DecoderOutput(sample=2 * self.decoder(latents) - 1)


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
        return BOUND * (latents / BOUND).tanh()


def is_taef2(weights: dict[str, Any]) -> bool:
    """Whether tensors are named as in the published file."""
    return "decoder.0.weight" not in weights and {"encoder.0.weight", "decoder.1.weight"} <= weights.keys()


def _convolution(in_channels: int = WIDTH, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, WIDTH, 3, stride, padding=1, bias=bias)
