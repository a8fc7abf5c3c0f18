"""The latent diffusion prior: what natural images look like. Frozen."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from filelock import FileLock
from huggingface_hub import cached_assets_path
from safetensors.torch import save_file
from torch import Tensor

from featinv_pl.errors import UserError, reason
from featinv_pl.files import atomic, read_json
from featinv_pl.nets import ldm
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.control import Residuals
from featinv_pl.nets.frozen import Frozen, weights_digest
from featinv_pl.nets.hub import find_folder, load_part
from featinv_pl.nets.precision import call_throughout
from featinv_pl.nets.spared import spare_kernels
from featinv_pl.nets.supported import SCHEDULE, SCHEDULER, check_prior, read_schedule
from featinv_pl.nets.weights import check_finite, read_weights

PROMPTS = "prompts.safetensors"
PROMPT = "a high-quality, detailed, and professional image"
LENGTH = 77  # tokens of a prompt of Stable Diffusion, the end filled up
OPTION, ADVICE = "`prior`", "Give a complete prior in diffusers' layout."
FILES = ["unet/*", "vae/*", "scheduler/*", "text_encoder/*", "tokenizer/*", PROMPTS]
TOKENIZER = "openai/clip-vit-large-patch14"  # that of Stable Diffusion 1, which its original files do not hold


class Prior(Frozen):
    """A frozen latent diffusion model with two stored prompt embeddings.

    Args:
        source: A folder with `unet/`, `vae/`, `scheduler/` in diffusers' layout, and either
            `prompts.safetensors`, which holds `prompt` and `empty`, both (L, D), or `text_encoder/` and
            `tokenizer/`; the hub name of such a folder (`lambdalabs/miniSD-diffusers`); or one file in the
            original layout of Stable Diffusion 1, `.ckpt` or `.safetensors`.

    Attributes:
        autoencoder: Between images and latents.
        schedule: The noise schedule that the UNet was trained with.
    """

    prompt: Tensor
    empty: Tensor

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        if Path(source).is_file():
            prompt, empty = self._load_file(Path(source))
        else:
            prompt, empty = self._load_folder(find_folder(source, FILES, OPTION))
        width = self.unet.config.cross_attention_dim
        if prompt.shape[1:] != (width,) or empty.shape != prompt.shape:
            raise UserError(
                f"{OPTION}: the prompts of '{source}' have the shapes {tuple(prompt.shape)} and "
                f"{tuple(empty.shape)}; its UNet needs (tokens, {width}) for both. Copy the prior again."
            )
        self.register_buffer("prompt", prompt)
        self.register_buffer("empty", empty)
        spare_kernels(self.unet)
        self.freeze()

    def _load_folder(self, folder: Path) -> tuple[Tensor, Tensor]:
        check_prior(folder, OPTION)
        self.autoencoder = LatentAutoencoder.load_folder(folder / "vae", OPTION)
        self.unet = load_part(UNet2DConditionModel, folder / "unet", OPTION)
        self.schedule = read_schedule(folder / SCHEDULER, OPTION)
        if (folder / PROMPTS).is_file():
            return _read_prompts(folder / PROMPTS)
        text, tokenizer = folder / "text_encoder", folder / "tokenizer"
        weights = sorted(text.glob("*.safetensors")) or sorted(text.glob("*.bin"))
        if not weights or not tokenizer.is_dir():
            raise UserError(
                f"{OPTION}: '{folder}' has neither {PROMPTS} nor both text_encoder/ and tokenizer/. "
                "Give a complete prior; fitting a NoisePredictor writes one without text."
            )
        config = read_json(text / "config.json", OPTION, ADVICE)
        return _encoded(read_weights(weights[0], OPTION), config, str(tokenizer))

    def _load_file(self, path: Path) -> tuple[Tensor, Tensor]:
        state, option = read_weights(path, OPTION), f"{OPTION} '{path}'"
        self.autoencoder = LatentAutoencoder(ldm.autoencoder(state, option))
        self.unet, self.schedule = ldm.unet(state, option), DDIMScheduler(**SCHEDULE)
        config, text_encoder = ldm.text_encoder(state, option)
        tokenizer = path.parent / "tokenizer"
        return _encoded(text_encoder, config, str(tokenizer) if tokenizer.is_dir() else TOKENIZER)

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder in the layout that `Prior` loads, with the prompts stored."""
        self.unet.save_pretrained(folder / "unet")
        self.autoencoder.vae.save_pretrained(folder / "vae")
        self.schedule.save_pretrained(folder / "scheduler")
        write_prompts(folder / PROMPTS, self.prompt, self.empty)

    def predict(self, latents: Tensor, timesteps: Tensor, prompts: Tensor, control: Residuals | None = None) -> Tensor:
        """Predict the noise, or the velocity if the prior was trained so, in the precision of the latents.

        With frozen weights the UNet's encoder builds no graph by itself: gradients start where the
        control's residuals enter, and flow through the decoder's activations only.

        Args:
            latents: (B, channels, h, w), scaled and noised.
            timesteps: (B,) or scalar.
            prompts: (B, L, D).
            control: Residuals of a ControlNet.
        """
        down, middle = control if control is not None else (None, None)
        prediction: Tensor = call_throughout(
            self.unet,
            latents,
            timesteps,
            prompts,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return prediction.to(latents)

    def latent_shape(self, moments: Tensor) -> tuple[int, ...]:
        """(channels, h, w) of one latent, given moments (B, 2 * channels, h, w)."""
        return self.autoencoder.latent_channels, *moments.shape[2:]

    def latent_grid(self, image_size: int) -> tuple[int, int, int]:
        """(channels, h, w) of the latents of square images with that side, in pixels."""
        side = image_size // self.autoencoder.downsampling
        return self.autoencoder.latent_channels, side, side

    @property
    def num_timesteps(self) -> int:
        """Length T of the noise schedule."""
        return int(self.schedule.config.num_train_timesteps)


def _read_prompts(path: Path) -> tuple[Tensor, Tensor]:
    weights = read_weights(path, OPTION)
    check_finite(weights, f"'{path}'", OPTION)
    prompt, empty = (weights.get(name, torch.empty(0)).float() for name in ("prompt", "empty"))
    return prompt, empty


def write_prompts(path: Path, prompt: Tensor, empty: Tensor) -> None:
    """Write the embeddings of the prompt and of the empty prompt, both (L, D), atomically."""
    with atomic(path) as partial:
        save_file({"prompt": prompt.contiguous(), "empty": empty.contiguous()}, partial)


def _encoded(state: dict[str, Tensor], config: dict[str, Any], tokenizer: str) -> tuple[Tensor, Tensor]:
    """Encode both prompts as Stable Diffusion 1 does, or take them from Hugging Face's cache of assets.

    Of a CLIP text model: weights as transformers names them, CLIPTextConfig, and folder or hub name of the tokenizer.
    """
    stored = cached_assets_path("featinv-pl", namespace="prompts", subfolder=weights_digest(state)) / PROMPTS
    with FileLock(stored.with_name(f".{PROMPTS}.lock")):  # processes that want the same prompts wait for the first
        if not stored.is_file():
            write_prompts(stored, *_encode(state, config, tokenizer))
    return _read_prompts(stored)


@torch.no_grad()
def _encode(state: dict[str, Tensor], config: dict[str, Any], tokenizer: str) -> tuple[Tensor, Tensor]:
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
            f"{OPTION}: the prompts could not be encoded with the prior's text encoder and the tokenizer '{tokenizer}' "
            f"({reason(error)}). Check the network, or put tokenizer/ of the same model beside the weights."
        ) from error
    prompt, empty = encoder.eval()(tokens.input_ids).last_hidden_state
    return prompt, empty
