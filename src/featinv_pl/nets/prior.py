"""The latent diffusion prior: what natural images look like. Frozen, in diffusers' layout."""

from pathlib import Path

from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.nets.autoencoder import LatentAutoencoder, load_part
from featinv_pl.nets.frozen import Frozen

Residuals = tuple[list[Tensor], Tensor]
"""What a ControlNet adds to the UNet: one tensor per skip connection, and one for the middle."""

PROMPTS = "prompts.safetensors"


class Prior(Frozen):
    """A frozen latent diffusion model with two stored prompt embeddings.

    Args:
        folder: A folder with `unet/`, `vae/`, `scheduler/` in diffusers' layout and
            `prompts.safetensors`, which holds `prompt` and `empty`, both (L, D).

    Attributes:
        autoencoder: Between images and latents.
        schedule: The noise schedule that the UNet was trained with.
    """

    prompt: Tensor
    empty: Tensor

    def __init__(self, folder: str) -> None:
        super().__init__()
        root = Path(folder)
        for part in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", PROMPTS):
            if not (root / part).is_file():
                raise UserError(
                    f"--model.prior: '{folder}' has no {part}. Give a folder with unet/, vae/ and scheduler/ in "
                    f"diffusers' layout and {PROMPTS}; fitting a NoisePredictor writes one."
                )
        self.folder = folder
        self.autoencoder = LatentAutoencoder(root / "vae", "--model.prior")
        self.unet = load_part(UNet2DConditionModel, root / "unet", "--model.prior")
        try:
            self.schedule = DDIMScheduler.from_pretrained(root / "scheduler")
            prompts = load_file(root / PROMPTS)
            self.register_buffer("prompt", prompts["prompt"])
            self.register_buffer("empty", prompts["empty"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--model.prior: the scheduler or {PROMPTS} of '{folder}' is damaged ({reason}). Make the prior anew."
            ) from error
        width = self.unet.config.cross_attention_dim
        if self.prompt.shape[1:] != (width,) or self.empty.shape != self.prompt.shape:
            raise UserError(
                f"--model.prior: the prompts of '{folder}' have the shapes {tuple(self.prompt.shape)} and "
                f"{tuple(self.empty.shape)}; its UNet wants (tokens, {width}) for both. Make the prior anew."
            )
        self.freeze()

    def predict(self, latents: Tensor, timesteps: Tensor, prompts: Tensor, control: Residuals | None = None) -> Tensor:
        """Predict the noise (or the velocity, if the prior was trained so).

        With frozen weights the UNet's encoder builds no graph by itself: gradients start where the
        control's residuals enter, and flow through the decoder's activations only.

        Args:
            latents: (B, channels, h, w), scaled and noised.
            timesteps: (B,) or scalar.
            prompts: (B, L, D).
            control: Residuals of a ControlNet.
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
        return prediction

    def latent_shape(self, moments: Tensor) -> tuple[int, ...]:
        """(channels, h, w) of one latent, given moments (B, 2 * channels, h, w)."""
        return self.autoencoder.latent_channels, *moments.shape[2:]

    @property
    def num_timesteps(self) -> int:
        """Length T of the noise schedule."""
        return int(self.schedule.config.num_train_timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` should return."""
        return denoising_target(self.schedule, latents, noise, timesteps)


def denoising_target(schedule: DDIMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The regression target of a denoiser: noise, or velocity (Salimans and Ho, arXiv 2202.00512).

    Args:
        schedule: Says which of the two.
        latents: (B, channels, h, w), clean and scaled.
        noise: Of the shape of `latents`.
        timesteps: (B,).
    """
    if schedule.config.prediction_type == "v_prediction":
        velocity: Tensor = schedule.get_velocity(latents, noise, timesteps)
        return velocity
    return noise
