"""What the authors' script does besides the step itself, so that each saving can be measured."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from featinv_pl.tasks.inversion import FeatureInversion
from featinv_pl.types import Batch

TOKENS = 77


class AuthorsInversion(FeatureInversion):
    """A FeatureInversion that wastes what the authors' code wastes.

    Args:
        online: Whether features (one image at a time), latents and prompts are computed at every step.
        decoder_gradients: Whether the weights of the UNet's decoder, which do not train, gather gradients, and those
            of what trains are kept until the next backward pass.
        **kwargs: Those of FeatureInversion.
    """

    def __init__(self, online: bool = True, decoder_gradients: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.decoder_gradients = decoder_gradients
        if decoder_gradients:
            for part in (
                self.inverter.prior.unet.up_blocks,
                self.inverter.prior.unet.conv_norm_out,
                self.inverter.prior.unet.conv_out,
            ):
                part.requires_grad_(True)
        width = self.inverter.prior.unet.config.cross_attention_dim
        # The text encoder of Stable Diffusion 1, at its size where the prior is.
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12, num_attention_heads=width // 64 or 1
        )
        self.text_encoder: Any = None
        if online:
            self.text_encoder = CLIPTextModel(config)
            self.text_encoder.requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A step, after all that could have been stored is computed."""
        if self.text_encoder is not None:
            batch = self._compute(batch)
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's own, unless gradients are given back."""
        if self.decoder_gradients:
            LightningModule.optimizer_step(self, *args, **kwargs)
        else:
            super().optimizer_step(*args, **kwargs)

    @torch.no_grad()
    def _compute(self, batch: Batch) -> Batch:
        images = batch["images"]
        features = torch.cat([self.inverter.classifier(image)[0] for image in images.split(1)])
        tokens = torch.zeros(len(images), TOKENS, dtype=torch.long, device=self.device)
        self.inverter.prior.prompt = self.text_encoder(tokens).last_hidden_state
        return {**batch, "features": features, "moments": self.inverter.prior.autoencoder.encode(images)}
