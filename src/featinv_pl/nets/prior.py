"""The latent diffusion prior: what natural images look like. Frozen."""

from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.files import read_json
from featinv_pl.nets import ldm
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.control import Residuals
from featinv_pl.nets.frozen import Frozen
from featinv_pl.nets.hub import find_folder, load_part
from featinv_pl.nets.prompts import FILE as PROMPTS
from featinv_pl.nets.prompts import encode_prompts, read_prompts, write_prompts
from featinv_pl.nets.supported import SCHEDULER, check_prior, read_schedule
from featinv_pl.nets.weights import read_weights

OPTION, ADVICE = "`prior`", "Give a complete prior in diffusers' layout."
FILES = ["unet/*", "vae/*", "scheduler/*", "text_encoder/*", "tokenizer/*", PROMPTS]
TOKENIZER = "openai/clip-vit-large-patch14"  # that of Stable Diffusion 1, which its original files do not hold


class Prior(Frozen):
    """A frozen latent diffusion model with two stored prompt embeddings.

    The text encoder of a prior that brings one serves once, to encode the prompts; see `encode_prompts`.

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
        self.freeze()

    def _load_folder(self, folder: Path) -> tuple[Tensor, Tensor]:
        check_prior(folder, OPTION)
        self.autoencoder = LatentAutoencoder(load_part(AutoencoderKL, folder / "vae", OPTION))
        self.unet = load_part(UNet2DConditionModel, folder / "unet", OPTION)
        self.schedule = read_schedule(folder / SCHEDULER, OPTION)
        if (folder / PROMPTS).is_file():
            return read_prompts(folder / PROMPTS, OPTION)
        text, tokenizer = folder / "text_encoder", folder / "tokenizer"
        weights = sorted(text.glob("*.safetensors")) or sorted(text.glob("*.bin"))
        if not weights or not tokenizer.is_dir():
            raise UserError(
                f"{OPTION}: '{folder}' has neither {PROMPTS} nor both text_encoder/ and tokenizer/. "
                "Give a complete prior; fitting a NoisePredictor writes one without text."
            )
        config = read_json(text / "config.json", OPTION, ADVICE)
        return encode_prompts(read_weights(weights[0], OPTION), config, str(tokenizer), OPTION)

    def _load_file(self, path: Path) -> tuple[Tensor, Tensor]:
        state, option = read_weights(path, OPTION), f"{OPTION} '{path}'"
        self.autoencoder = LatentAutoencoder(ldm.autoencoder(state, option))
        self.unet, self.schedule = ldm.unet(state, option), ldm.schedule()
        config, text_encoder = ldm.text_encoder(state, option)
        tokenizer = path.parent / "tokenizer"
        return encode_prompts(text_encoder, config, str(tokenizer) if tokenizer.is_dir() else TOKENIZER, OPTION)

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder in the layout that `Prior` loads, with the prompts stored."""
        self.unet.save_pretrained(folder / "unet")
        self.autoencoder.vae.save_pretrained(folder / "vae")
        self.schedule.save_pretrained(folder / "scheduler")
        write_prompts(folder / PROMPTS, self.prompt, self.empty)

    def predict(self, latents: Tensor, timesteps: Tensor, prompts: Tensor, control: Residuals | None = None) -> Tensor:
        """Predict the noise (or the velocity, if the prior was trained so).

        With frozen weights the UNet's encoder builds no graph by itself: gradients start where the
        control's residuals enter, and flow through the decoder's activations only.

        Args:
            latents: (B, channels, h, w), scaled and noised.
            timesteps: (B,) or scalar.
            prompts: (B, L, D).
            control: Residuals of a ControlNet.

        Returns:
            A tensor like `latents`, also in mixed precision: what follows is arithmetic of few, small numbers.
        """
        down, middle = control if control is not None else (None, None)
        prediction: Tensor = self.unet(
            latents,
            timesteps,
            encoder_hidden_states=prompts,
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
