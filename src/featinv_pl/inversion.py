"""The method: p(image | feature map), learned by steering a frozen latent diffusion prior."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW

from featinv_pl.errors import UserError
from featinv_pl.nets.backbone import PENULTIMATE, Backbone
from featinv_pl.nets.control import FeatureControl
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.prior import Prior
from featinv_pl.nets.sources import fill
from featinv_pl.optimisation import optimise
from featinv_pl.sampling.guidance import Denoiser, classifier_free
from featinv_pl.sampling.noise import generator, keyed_noise
from featinv_pl.sampling.sampler import Sampler, sample
from featinv_pl.types import Batch, Inversion, Provenance, Views, from_uint8


class FeatureInversion(LightningModule):
    """Draws images from a classifier's feature map (FeatInv, arXiv 2505.21032).

    The classifier and the prior are frozen and named by string, so that a checkpoint holds the
    trained control alone, with digests of the two.

    Args:
        backbone: The classifier: a timm name or a folder written by fitting a `Classifier`.
        prior: The latent diffusion prior: a hub name, a folder in diffusers' layout, or a file of Stable
            Diffusion 1.
        image_size: Side of the images that are drawn, in pixels: the prior's resolution.
        weights: The classifier's weights: `pretrained`, `random`, or a file.
        layer: The classifier's layer whose output is inverted.
        input_size: Side of the images that the classifier sees, if not that of its configuration.
        control: A model folder, as `featinv-pl export` and `import` write it, whose control to start from.
        conditioning: `spatial` gives the control the whole map; `pooled` its mean, copied to every
            location, which is what the paper compares against.
        dropout: Probability with which training replaces map and prompt together, by zeros and by
            the empty prompt.
        hidden_channels: Width of the feature encoder.
        num_layers: Its number of convolutions.
        sampler: How reconstructions are drawn.
        optimizer: Factory of the optimizer of the control.
        lr_scheduler: Factory of a learning rate schedule, advanced every step.
        judge: A second classifier, which the inversion has never seen: it scores originals and
            reconstructions too. A timm name or a folder, as for the backbone.
        num_samples: Reconstructions that `test` draws from each map. The first is scored; from two on,
            so is how much they differ.
    """

    def __init__(
        self,
        backbone: str,
        prior: str,
        image_size: int = 256,
        weights: str = "pretrained",
        layer: str = PENULTIMATE,
        input_size: int | None = None,
        control: Path | None = None,
        conditioning: Literal["spatial", "pooled"] = "spatial",
        dropout: float = 0.15,
        hidden_channels: int = 512,
        num_layers: int = 3,
        sampler: Sampler = Sampler(),  # noqa: B008 (frozen: it cannot be changed by a caller)
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        judge: str | None = None,
        num_samples: int = 1,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"--model.dropout is a probability below 1, and is {dropout}.")
        if num_samples < 1:
            raise UserError(f"--model.num_samples must be at least 1, and is {num_samples}.")
        self.backbone = Backbone(backbone, weights, layer, input_size)
        self.prior = Prior(prior)
        self.image_size = image_size
        self.control = FeatureControl(self.prior.unet, self.backbone.feature_shape[0], hidden_channels, num_layers)
        if control is not None:
            self.control.load_pretrained(control, "--model.control")
        self.conditioning = conditioning
        self.dropout = dropout
        self.sampler = sampler
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.judge = Backbone(judge) if judge else None
        self.num_samples = num_samples

    # The method

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of denoising, as in the paper: the loss is the error of the predicted noise."""
        rng = generator(torch.initial_seed(), self.global_rank, self.current_epoch, batch_idx)
        moments, features = batch["latents"], self.condition(batch["features"])
        size = len(moments)

        noise = torch.randn(2, size, *self.prior.latent_shape(moments), generator=rng).to(moments)
        timesteps = torch.randint(self.prior.num_timesteps, (size,), generator=rng).to(self.device)
        dropped = (torch.rand(size, 1, 1, generator=rng) < self.dropout).to(self.device)

        latents = self.prior.autoencoder.sample(moments, noise[0])
        prompts = torch.where(dropped, self.prior.empty, self.prior.prompt)
        features = torch.where(dropped.unsqueeze(-1), torch.zeros_like(features), features)
        loss = self.loss(latents, noise[1], timesteps, prompts, features)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def loss(self, latents: Tensor, noise: Tensor, timesteps: Tensor, prompts: Tensor, features: Tensor) -> Tensor:
        """Mean squared error of the noise (or velocity) that the controlled prior predicts.

        Args:
            latents: (B, channels, H / f, W / f), clean and scaled.
            noise: Of the shape of `latents`.
            timesteps: (B,).
            prompts: (B, L, D).
            features: (B, C, h, w), as `condition` returns them.
        """
        noisy_latents = self.prior.schedule.add_noise(latents, noise, timesteps)
        encoded = self.control.encoder(features, latents.shape[-2:])
        residuals = self.control(noisy_latents, timesteps, prompts, encoded)
        prediction = self.prior.predict(noisy_latents, timesteps, prompts, residuals)
        return functional.mse_loss(prediction, self.prior.target(latents, noise, timesteps))

    def condition(self, features: Tensor) -> Tensor:
        """What the control may see of the feature map (B, C, h, w)."""
        if self.conditioning == "pooled":
            return features.mean(dim=(2, 3), keepdim=True).expand_as(features)
        return features

    @torch.no_grad()
    def invert(self, features: Tensor, noise: Tensor) -> Tensor:
        """Draw images whose feature maps should be those given.

        Args:
            features: (B, C, h, w).
            noise: (B, latent channels, H / f, W / f), standard normal.

        Returns:
            (B, 3, H, W), about [-1, 1].
        """
        latents = sample(self.denoiser(features, noise), noise, self.prior.schedule, self.sampler)
        return self.prior.autoencoder.decode(latents)

    def denoiser(self, features: Tensor, noise: Tensor) -> Denoiser:
        """The controlled and guided prior for a batch of feature maps, which it encodes once."""
        features = self.condition(features)
        encoded = self.control.encoder(features, noise.shape[-2:])
        prompts = self.prior.prompt.expand(len(features), -1, -1)
        guided = self.sampler.guidance_scale != 1
        if guided:
            null = encoded
            if self.sampler.guidance == "features":
                null = self.control.encoder(torch.zeros_like(features), noise.shape[-2:])
            encoded = torch.cat([null, encoded])
            prompts = torch.cat([self.prior.empty.expand_as(prompts), prompts])

        def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
            residuals = self.control(latents, timestep, prompts, encoded)
            return self.prior.predict(latents, timestep, prompts, residuals)

        return classifier_free(denoise, self.sampler.guidance_scale) if guided else denoise

    # Evaluation

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Inversion:
        """Reconstruct a batch from its maps, and once more by the autoencoder alone."""
        moments = batch["latents"]
        mean = self.prior.autoencoder.sample(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
        images = self._draw(batch)
        views = self.backbone.look(images)
        # As bytes they would look like any image.
        views["features"][~images.flatten(1).isfinite().all(1)] = torch.nan
        return {
            "images": views["images"],
            "features": views["features"],
            "logits": views["logits"],
            "ceiling": self.backbone.look(self.prior.autoencoder.decode(mean)),
        }

    def _draw(self, batch: Batch) -> Tensor:
        """Images for the maps of a batch, but for those that are drawn already."""
        drawn = {row: from_uint8(image.to(self.device)) for row, image in batch.get("drawn", {}).items()}
        missing = [row for row in range(len(batch["key"])) if row not in drawn]
        if missing:
            features = batch["features"][missing]
            shape = self.prior.latent_shape(batch["latents"])
            noise = keyed_noise([batch["key"][row] for row in missing], shape, torch.initial_seed())
            drawn |= dict(zip(missing, self.invert(features, noise.to(features)), strict=True))
        return torch.stack([drawn[row] for row in range(len(batch["key"]))])

    @torch.no_grad()
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Inversion:
        """As in validation, and with further samples from each map if so many are asked for."""
        outputs = self.validation_step(batch, batch_idx)
        if self.num_samples > 1:
            shape = self.prior.latent_shape(batch["latents"])
            samples: list[Views] = [outputs]
            for number in range(1, self.num_samples):
                noise = keyed_noise([f"{key} sample {number}" for key in batch["key"]], shape, torch.initial_seed())
                samples.append(self.backbone.look(self.invert(batch["features"], noise.to(batch["features"]))))
            outputs["sample_images"] = torch.stack([views["images"] for views in samples], dim=1)
            outputs["sample_features"] = torch.stack([views["features"] for views in samples], dim=1)
        return outputs

    # What Lightning asks for

    def setup(self, stage: str) -> None:
        """Refuse shard sets that other frozen parts have made, before anything is computed."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:  # loaders given by hand answer for themselves
            return
        if not hasattr(datamodule, "manifests"):
            raise UserError(
                f"--data: FeatureInversion reads feature shards, and {type(datamodule).__name__} gives images. "
                "Extract their features first (featinv-pl predict), then give FeatureShards."
            )
        for folder, manifest in datamodule.manifests.items():
            theirs: Provenance = manifest["provenance"]
            shape = tuple(theirs["feature_shape"])
            if theirs["backbone_digest"] != self.frozen["backbone"] or shape != self.backbone.feature_shape:
                raise UserError(
                    f"The shard set '{folder}' was made with the backbone '{theirs['backbone']}' (maps of {shape}, "
                    f"weights {theirs['backbone_digest'][:8]}); --model.backbone is '{self.backbone.name}' (maps of "
                    f"{self.backbone.feature_shape}, weights {self.frozen['backbone'][:8]}). "
                    "Give the backbone that made the shards, or extract features with this one."
                )
            for option, made_with, ours in (
                ("layer", theirs["layer"], self.backbone.layer),
                ("input_size", theirs["transform"], self.backbone.transform_name),
                ("image_size", theirs["image_size"], self.image_size),
            ):
                if made_with != ours:
                    raise UserError(
                        f"--model.{option}: the shard set '{folder}' was made with '{made_with}', and this model has "
                        f"'{ours}'. Give what made the shards, or extract features with this."
                    )
            if theirs["autoencoder_digest"] != self.frozen["autoencoder"]:
                raise UserError(
                    f"The latents of the shard set '{folder}' were made with another autoencoder (weights "
                    f"{theirs['autoencoder_digest'][:8]}) than that of --model.prior '{self.prior.source}' (weights "
                    f"{self.frozen['autoencoder'][:8]}). Give that prior, or extract features with this one."
                )

    def configure_optimizers(self) -> Any:
        """Optimise the control alone."""
        return optimise(self.control.parameters(), self.optimizer_factory, self.lr_scheduler_factory)

    @cached_property
    def frozen(self) -> dict[str, str]:
        """Digests of the frozen parts."""
        return {
            "backbone": digest(self.backbone.model),
            "autoencoder": digest(self.prior.autoencoder),
            "unet": digest(self.prior.unet),
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained half alone: frozen parts are named, not stored."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "control." in name}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the trained half, strictly: a missing or unexpected weight is an error."""
        control = {name.removeprefix("control."): value for name, value in state_dict.items()}
        return fill(self.control, control, "control", "--ckpt_path")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the control belongs to."""
        checkpoint["inversion"] = self.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, before training starts."""
        theirs = checkpoint.get("inversion")
        if theirs is None:
            raise UserError("--ckpt_path: the checkpoint is not one of a FeatureInversion.")
        different = [name for name, ours in self.identity.items() if theirs.get(name) != ours]
        if different:
            sides = "; ".join(
                f"{name}: {theirs.get(name)} in the checkpoint, {self.identity[name]} here" for name in different
            )
            raise UserError(
                f"--ckpt_path: the checkpoint belongs to another model ({sides}). "
                "Give the configuration that it was trained with."
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the model that loads it."""
        return {
            "conditioning": self.conditioning,
            "layer": self.backbone.layer,
            "feature_shape": list(self.backbone.feature_shape),
            "hidden_channels": self.control.encoder.hidden_channels,
            **self.frozen,
        }
