"""The two prompts of the method, encoded once and stored, so that no run keeps a text encoder."""

from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import cached_assets_path
from safetensors.torch import save_file
from torch import Tensor

from featinv_pl.errors import UserError, reason
from featinv_pl.files import atomic
from featinv_pl.nets.frozen import weights_digest
from featinv_pl.nets.weights import check_finite, read_weights

PROMPT = "a high-quality, detailed, and professional image"
FILE = "prompts.safetensors"
LENGTH = 77  # tokens of a prompt of Stable Diffusion, the end filled up


def read_prompts(path: Path, option: str) -> tuple[Tensor, Tensor]:
    """Read the stored embeddings: of the prompt and of the empty prompt, both (L, D)."""
    weights = read_weights(path, option)
    check_finite(weights, f"'{path}'", option)
    prompt, empty = (weights.get(name, torch.empty(0)).float() for name in ("prompt", "empty"))
    return prompt, empty


def write_prompts(path: Path, prompt: Tensor, empty: Tensor) -> None:
    """Write embeddings (L, D) atomically."""
    with atomic(path) as partial:
        save_file({"prompt": prompt.contiguous(), "empty": empty.contiguous()}, partial)


def encode_prompts(
    state: dict[str, Tensor], config: dict[str, Any], tokenizer: str, option: str
) -> tuple[Tensor, Tensor]:
    """Encode both prompts as Stable Diffusion 1 does, or take them from Hugging Face's cache of assets.

    Args:
        state: Weights of a CLIP text model, as transformers names them, whose digest is the key of the cache.
        config: Its CLIPTextConfig, as a dictionary.
        tokenizer: A folder or hub name of its CLIPTokenizer.
        option: The argument that named the prior, for errors.

    Returns:
        The last hidden states of the prompt and of the empty prompt, both (L, D).
    """
    stored = cached_assets_path("featinv-pl", namespace="prompts", subfolder=weights_digest(state)) / FILE
    with FileLock(stored.with_name(f".{FILE}.lock")):  # processes that want the same prompts wait for the first
        if not stored.is_file():
            write_prompts(stored, *_encode(state, config, tokenizer, option))
    return read_prompts(stored, option)


@torch.no_grad()
def _encode(state: dict[str, Tensor], config: dict[str, Any], tokenizer: str, option: str) -> tuple[Tensor, Tensor]:
    # Two seconds of import that only this function needs.
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    try:
        loaded: Any = CLIPTextModel.from_pretrained(
            None, config=CLIPTextConfig.from_dict(config), state_dict=state, output_loading_info=True
        )
        encoder, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"the text encoder lacks {len(missing)} weights, such as {missing[0]}")
        tokenize = CLIPTokenizer.from_pretrained(tokenizer)
        # Where the files are out of reach, transformers makes an empty tokenizer without a word.
        if len(tokenize) != encoder.config.vocab_size:
            raise ValueError(f"it knows {len(tokenize)} tokens instead of {encoder.config.vocab_size}")
        tokens = tokenize([PROMPT, ""], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{option}: the prompts could not be encoded with the prior's text encoder and the tokenizer '{tokenizer}' "
            f"({reason(error)}). Check the network, or put tokenizer/ of the same model beside the weights."
        ) from error
    prompt, empty = encoder.eval()(tokens.input_ids).last_hidden_state
    return prompt, empty
