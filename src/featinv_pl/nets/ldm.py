"""Stable Diffusion 1 and the authors' FeatInv in their original layout (LDM's names for the same networks).

Diffusers' own converters translate the names; the shapes tell the rest of the architecture. `option` named the file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn

from featinv_pl.errors import UserError, reason
from featinv_pl.nets.control import FeatureControl
from featinv_pl.nets.supported import check_unet
from featinv_pl.nets.weights import fill

State = dict[str, Tensor]

UNET, AUTOENCODER, CONTROL = "model.diffusion_model.", "first_stage_model.", "control_model."
TEXT_ENCODER = "cond_stage_model.transformer."
HINT = "control_model.input_hint_block.block."
NUM_HEADS: Final = 8  # of attention in Stable Diffusion 1; the one thing that shapes do not tell
SCALING_FACTOR: Final = 0.18215
GROUPS: Final = 32


def check_prior(state: State, option: str) -> None:
    """Refuse a file whose UNet is not supported, as far as its shapes tell; it may have none."""
    if any(name.startswith(UNET) for name in state):
        with _complete("UNet", option):
            _checked_unet(state, option)


def unet(state: State, option: str, num_heads: int = NUM_HEADS) -> UNet2DConditionModel:
    """Build the UNet of a state dict that holds `model.diffusion_model.*`."""
    with _complete("UNet", option):
        config = _checked_unet(state, option)
        network = UNet2DConditionModel(**config, attention_head_dim=num_heads)
        fill(network, convert_ldm_unet_checkpoint(state, config), "UNet", option)
        return network


def autoencoder(state: State, option: str) -> AutoencoderKL:
    """Build the autoencoder of a state dict that holds `first_stage_model.*`."""
    with _complete("autoencoder", option):
        config = _autoencoder_config(_needed(state, AUTOENCODER, "autoencoder", option))
        network = AutoencoderKL(**config)
        fill(network, convert_ldm_vae_checkpoint(state, config), "autoencoder", option)
        return network


@contextmanager
def _complete(what: str, option: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a file that lacks tensors, diffusers' converters raise anything
        raise UserError(
            f"{option}: the tensors of the {what} are not those of Stable Diffusion 1 ({type(error).__name__}: "
            f"{reason(error)}). They belong to another architecture, or the file is incomplete."
        ) from error


def text_encoder(state: State, option: str) -> tuple[dict[str, int], State]:
    """The arguments of a CLIPTextConfig and the weights of the text encoder, whose names are those of transformers."""
    with _complete("text encoder", option):
        weights = _needed(state, TEXT_ENCODER, "text encoder", option)
        [embeddings], [positions], wide = (
            [value for name, value in weights.items() if name.endswith(f"{layer}.weight")]
            for layer in ("token_embedding", "position_embedding", "mlp.fc1")
        )
        vocab_size, hidden_size = embeddings.shape
        config = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": wide[0].shape[0],
            "num_hidden_layers": len(wide),
            "num_attention_heads": max(1, hidden_size // 64),
            "max_position_embeddings": positions.shape[0],
        }
        return config, weights


def load_control(control: FeatureControl, state: State, option: str) -> None:
    """Load the authors' trained half, `control_model.*`: their ControlNet, whose hint block is our feature encoder."""
    with _complete("ControlNet", option):
        hint = _needed(state, HINT, "feature encoder", option)
        given, channels = hint["1.weight"].shape[1], control.encoder.config.in_channels
        if given != channels:
            raise UserError(
                f"{option}: the file holds a feature encoder for {given} channels, and the backbone's map has "
                f"{channels}. Give the backbone that the file was trained for, at its input size."
            )
        # Theirs begins with the upsampling, which has no weights and is no layer of ours.
        encoder = {f"{int(index) - 1}.{name}": value for key, value in hint.items() for index, name in [key.split(".")]}
        fill(control.encoder.layers, encoder, "feature encoder", option)
        rest = {name: value for name, value in state.items() if name.startswith(CONTROL) and not name.startswith(HINT)}
        converted = convert_controlnet_checkpoint(rest, control.controlnet.config)
        fill(control.controlnet, converted, "ControlNet", option)


def largest_difference(network: nn.Module, other: nn.Module) -> float:
    """Largest relative L2 difference between equally named tensors of two networks; infinite if shapes differ."""
    ours, theirs = network.state_dict(), other.state_dict()
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in theirs.items()}:
        return float("inf")
    return max(float((ours[name] - theirs[name]).norm() / ours[name].norm().clamp(min=1e-12)) for name in ours)


def _needed(state: State, prefix: str, what: str, option: str) -> State:
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        raise UserError(
            f"{option}: the file has no {what} ({prefix}*). Give a complete checkpoint in the original layout of "
            "Stable Diffusion 1."
        )
    return found


def _checked_unet(state: State, option: str) -> dict[str, Any]:
    config = _unet_config(_needed(state, UNET, "UNet", option), option)
    channels = _autoencoder_config(_needed(state, AUTOENCODER, "autoencoder", option))["latent_channels"]
    check_unet(config, channels, "the file", option)
    return config


def _unet_config(state: State, option: str) -> dict[str, Any]:
    downsamplers = sorted(int(name.split(".")[1]) for name in state if name.endswith(".0.op.weight"))
    attention = {int(name.split(".")[1]) for name in state if name.endswith("1.norm.weight") and "input" in name}
    keys = [value for name, value in state.items() if name.endswith("attn2.to_k.weight")]
    projections = [value for name, value in state.items() if name.endswith("proj_in.weight")]
    if not downsamplers or not keys or projections[0].ndim != 4:
        raise UserError(
            f"{option}: the UNet of the file is not that of Stable Diffusion 1, to which MiniSD belongs. "
            "Give a file of that family, or a folder in diffusers' layout."
        )
    per_level = downsamplers[0]  # one input convolution or downsampler, then the blocks
    levels = range(len(downsamplers) + 1)
    attended = [any(level * per_level < block <= (level + 1) * per_level for block in attention) for level in levels]
    widths = [state[f"input_blocks.{block}.0.op.weight"].shape[0] for block in downsamplers]
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "block_out_channels": [*widths, state["middle_block.0.out_layers.3.weight"].shape[0]],
        "layers_per_block": per_level - 1,
        "cross_attention_dim": keys[0].shape[1],
        "class_embed_type": "projection" if any(name.startswith("label_emb.") for name in state) else None,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attended)],
        "norm_num_groups": GROUPS,
        "sample_size": 32,
    }


def _autoencoder_config(state: State) -> dict[str, Any]:
    levels = len({name.split(".")[2] for name in state if name.startswith("encoder.down.")})
    blocks = len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")})
    return {
        "block_out_channels": [state[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": blocks,
        "latent_channels": state["quant_conv.weight"].shape[0] // 2,
        "norm_num_groups": GROUPS,
        "scaling_factor": SCALING_FACTOR,
        "sample_size": 256,
    }
