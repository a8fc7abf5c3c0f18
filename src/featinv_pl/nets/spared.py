"""What a UNet or ControlNet of diffusers computes more often than needed: kernels that a GPU need not launch."""

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, cat, nn
from torch.nn import functional

JOINED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}


class One:
    """The factor 1 that costs no kernel: diffusers multiplies and divides whole activations by factors that are 1."""

    def __rmul__(self, tensor: Tensor) -> Tensor:
        return tensor

    __rtruediv__ = __rmul__


class Transformer(Transformer2DModel):  # type: ignore[misc]
    """One whose last product reads tokens as they are; diffusers reorders them, and gradients, for a convolution."""

    def _get_output_for_continuous_inputs(self, hidden_states: Tensor, residual: Tensor, **sizes: int) -> Tensor:
        tokens: Tensor = functional.linear(hidden_states, self.proj_out.weight.flatten(1), self.proj_out.bias)
        output: Tensor = residual + tokens.transpose(1, 2).unflatten(2, residual.shape[2:])
        return output


def spare_kernels(network: nn.Module) -> None:
    """Leave out factors of 1, repeated activations of the timestep's embedding, and copies; join products of one input.

    The network computes the same, and its state dict keeps diffusers' names. Call it before an optimizer is made.
    """
    for module in network.modules():
        for name in ("output_scale_factor", "rescale_output_factor"):
            if getattr(module, name, None) == 1:
                setattr(module, name, One())
        if type(module) is Attention and type(module.processor) is AttnProcessor2_0:
            _join_products(module)
        elif type(module) is Transformer2DModel and module.is_input_continuous:
            module.__class__ = Transformer
    _activate_once(network)


def _activate_once(network: Any) -> None:
    """Activate the timestep's embedding where it is made: every block would do it again."""
    blocks = [one for one in network.modules() if isinstance(one, ResnetBlock2D) and one.time_emb_proj is not None]
    if network.time_embedding.post_act is None and all(type(one.nonlinearity) is nn.SiLU for one in blocks):
        network.time_embedding.post_act = nn.SiLU()
        for block in blocks:
            block.skip_time_act = True


def _join_products(attention: Attention) -> None:
    """Multiply queries, keys and values by one matrix; keys and values, where they are of the prompt."""
    joined, trained = "to_kv" if attention.is_cross_attention else "to_qkv", attention.to_k.weight.requires_grad
    attention.fuse_projections()
    attention.set_processor(FusedAttnProcessor2_0())
    getattr(attention, joined).requires_grad_(trained)
    for name in JOINED[joined]:
        delattr(attention, name)
    attention.register_state_dict_post_hook(_divide)
    attention.register_load_state_dict_pre_hook(_join)


def _divide(attention: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Name the parts of a joined matrix as diffusers does."""
    for joined, parts in JOINED.items():
        for kind in ("weight", "bias"):
            if (whole := state.pop(f"{prefix}{joined}.{kind}", None)) is not None:
                names = (f"{prefix}{part}.{kind}" for part in parts)
                state.update(zip(names, whole.chunk(len(parts)), strict=True))


def _join(attention: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for joined, parts in JOINED.items():
        for kind in ("weight", "bias"):
            names = [f"{prefix}{part}.{kind}" for part in parts]
            if hasattr(attention, joined) and all(name in state for name in names):
                state[f"{prefix}{joined}.{kind}"] = cat([state.pop(name) for name in names])
