"""The trained half: a feature map steers the prior through an encoder and a ControlNet."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from diffusers import ConfigMixin, ControlNetModel, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

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
        hidden_channels: Its width.
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
        encoded: Tensor = self.layers(functional.interpolate(features, size, mode="bilinear", align_corners=False))
        return encoded


class FeatureControl(nn.Module):
    """A ControlNet that reads feature maps of `in_channels`, and starts as a copy of the prior's UNet's encoder."""

    def __init__(self, unet: UNet2DConditionModel, in_channels: int, encoder: Encoder) -> None:
        super().__init__()
        width = unet.config.block_out_channels[0]
        self.encoder: FeatureEncoder = FeatureEncoder(in_channels, width, encoder.hidden_channels, encoder.num_layers)
        self.controlnet = ControlNetModel.from_unet(unet)
        # The encoder stands outside, so that a map is encoded once and serves every sampling step.
        self.controlnet.controlnet_cond_embedding = nn.Identity()

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
        down, middle = self.controlnet(latents, timesteps, prompts, encoded, scale, return_dict=False)
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
