"""Attention to prompts, whose keys and values do not change from one sampling step to the next."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

Projected = dict[str, tuple[Tensor, Tensor]]
"""By the name of a layer, keys and values of prompts, both (B, heads, L, D / heads)."""
Prompts = Tensor | Projected
"""(B, L, D), or what `project_prompts` made of them."""


class PromptAttention:
    """Attention of one layer to prompts, in the form that diffusers wants; its own projects them at every call.

    Args:
        layer: The layer's name in its network.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Prompts, attention_mask: None = None
    ) -> Tensor:
        """Attend.

        Args:
            attention: diffusers' layer.
            hidden_states: (B, N, C).
            encoder_hidden_states: The prompts.
            attention_mask: Not used: prompts are filled up, not masked.
        """
        prompts = encoder_hidden_states
        keys, values = _project(attention, prompts) if isinstance(prompts, Tensor) else prompts[self.layer]
        queries = _heads(attention, attention.to_q(hidden_states))
        attended = functional.scaled_dot_product_attention(queries, keys, values)
        output: Tensor = attention.to_out[0](attended.transpose(1, 2).flatten(2))
        return output


def attend_to_projected(network: Any) -> None:
    """Let a UNet or ControlNet of diffusers take what `project_prompts` returns, too."""
    own = network.attn_processors
    ours = {f"{layer}.processor": PromptAttention(layer) for layer in _layers(network)}
    network.set_attn_processor({**own, **ours})


def project_prompts(network: nn.Module, prompts: Tensor) -> Projected:
    """Compute what all layers of a network need of prompts, once for many calls.

    Args:
        network: One that `attend_to_projected` has prepared; its weights must not change in between.
        prompts: (B, L, D).
    """
    return {layer: _project(attention, prompts) for layer, attention in _layers(network).items()}


def _layers(network: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in network.named_modules() if getattr(layer, "is_cross_attention", False)}


def _project(attention: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    return _heads(attention, attention.to_k(prompts)), _heads(attention, attention.to_v(prompts))


def _heads(attention: Any, tokens: Tensor) -> Tensor:
    """(B, N, C) to (B, heads, N, C / heads)."""
    heads: Tensor = tokens.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    return heads
