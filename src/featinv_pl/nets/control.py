"""The trained half: a feature map steers the prior through an encoder and a ControlNet."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ControlNetModel, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from featinv_pl.nets.precision import call_throughout
from featinv_pl.nets.spared import One, spare_kernels
from featinv_pl.nets.weights import fill, read_weights
from featinv_pl.sampling.sampler import check_option

Residuals = tuple[list[Tensor], Tensor]
"""A ControlNet's residuals for the UNet: one tensor per skip connection, and one for the middle block."""

PARTS = ("encoder", "controlnet")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Encoder:
    """Size of a feature encoder; the defaults are the authors'.

    Args:
        hidden_channels: Its width in channels.
        num_layers: Its number of convolutions.
    """

    hidden_channels: int = 512
    num_layers: int = 3

    def __post_init__(self) -> None:
        for name, value, least in (("hidden_channels", self.hidden_channels, 1), ("num_layers", self.num_layers, 2)):
            check_option(f"encoder.{name}", value, value >= least, f"Give at least {least}.")


class FeatureEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Brings a feature map (B, C, h, w) to the width and grid of the prior's first layer.

    Bilinear upsampling to the latent grid, then `num_layers` 3x3 convolutions with SiLU between them, three in the
    authors' code. The last one starts at zero, as there, so that training starts from the bare prior.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, in_channels: int, out_channels: int, hidden_channels: int = 512, num_layers: int = 3) -> None:
        super().__init__()
        widths = [in_channels, *[hidden_channels] * (num_layers - 1), out_channels]
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Conv2d(width, following, 3, padding=1), nn.SiLU()]
        for parameter in layers[-2].parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Encode feature maps (B, C, h, w) on the latent grid `size`: (B, out_channels, H / f, W / f)."""
        return self.write(self.read(features, size))

    def read(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """The last hidden activations (B, hidden_channels, H / f, W / f)."""
        layers: Any = self.layers
        first, *others = layers[:-1]
        hidden: Tensor = _convolved_upsampling(first.weight, first.bias, features, size)
        for layer in others:
            hidden = layer(hidden)
        return hidden

    def write(self, hidden: Tensor) -> Tensor:
        """Encode what `read` returns."""
        encoded: Tensor = self.layers[-1](hidden)
        return encoded


def _convolved_upsampling(weight: Tensor, bias: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    """A 3x3 convolution of the bilinearly upsampled maps, (B, O, *size), at a small part of the cost.

    Both are linear: here the nine taps are applied to the small maps (B, C, h, w), and what they give is interpolated,
    unless that takes more products.
    """
    batch, channels, height, width = features.shape
    places = height * width
    if places / channels + places / (size[0] * size[1]) >= 1:
        return functional.conv2d(_upsampled(features, size), weight, bias, padding=1)
    taps = weight.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)  # of each output in turn
    # Those in the middle give the bias, too: what they are interpolated with sums to 1 everywhere.
    tapped = functional.conv2d(features, taps, functional.pad(bias[:, None], (4, 4)).flatten())
    one_hot = torch.eye(places, device=features.device, dtype=features.dtype).view(places, 1, height, width)
    interpolation = functional.unfold(_upsampled(one_hot, size), 3, padding=1).transpose(0, 1)  # 0 beyond the borders
    return (tapped.view(batch, -1, 9 * places) @ interpolation.reshape(9 * places, -1)).view(batch, -1, *size)


def _upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    upsampled: Tensor = functional.interpolate(maps, size, mode="bilinear", align_corners=False)
    return upsampled


class FeatureControl(nn.Module):
    """A ControlNet that reads feature maps of `in_channels`, and starts as a copy of the prior's UNet's encoder."""

    def __init__(self, unet: UNet2DConditionModel, in_channels: int, encoder: Encoder) -> None:
        super().__init__()
        width = unet.config.block_out_channels[0]
        self.encoder: FeatureEncoder = FeatureEncoder(in_channels, width, encoder.hidden_channels, encoder.num_layers)
        self.controlnet = ControlNetModel.from_unet(unet)
        # The encoder stands outside, so that a map is encoded once and serves every sampling step.
        self.controlnet.controlnet_cond_embedding = nn.Identity()
        spare_kernels(self.controlnet)

    def forward(
        self, latents: Tensor, timesteps: Tensor, prompts: Tensor, encoded: Tensor, scale: float = 1.0
    ) -> Residuals:
        """Compute what is added to the UNet.

        Args:
            latents: (B, channels, h, w), scaled and noised.
            timesteps: (B,) or scalar.
            prompts: (B, L, D).
            encoded: The output of `encoder` for the feature maps, on the grid of `latents`.
            scale: Multiplies all residuals.
        """
        factor = One() if scale == 1 else scale
        down, middle = call_throughout(
            self.controlnet,
            latents,
            timesteps,
            prompts,
            controlnet_cond=encoded,
            conditioning_scale=factor,
            return_dict=False,
        )
        return down, middle

    def save_pretrained(self, folder: Path) -> None:
        """Write `encoder/` and `controlnet/` in diffusers' layout."""
        for name in PARTS:
            getattr(self, name).save_pretrained(folder / name)

    def load_pretrained(self, folder: Path, option: str, adapt: bool = False) -> None:
        """Load what `save_pretrained` has written to a folder, which `option` named.

        `adapt` keeps the new weights of the encoder where its shapes differ, as for the maps of another backbone.
        """
        # diffusers' own loader would put a fresh embedding of pictures in place of the encoder's output.
        for name in PARTS:
            network = self.get_submodule(name)
            weights = read_weights(folder / name / WEIGHTS, option)
            if adapt and name == "encoder":
                own = network.state_dict()
                fitting = {key: one for key, one in weights.items() if key in own and one.shape == own[key].shape}
                weights = {**own, **fitting}
            fill(network, weights, f"{name} in '{folder}'", option)
