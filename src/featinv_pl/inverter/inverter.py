"""p(image | feature map): a classifier, a frozen latent diffusion prior, and the control that joins them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import Backbone
from featinv_pl.nets.control import Encoder, FeatureControl, Residuals
from featinv_pl.nets.frozen import digest, weights_digest
from featinv_pl.nets.precision import call_again
from featinv_pl.nets.prior import Prior
from featinv_pl.sampling.noise import keyed_noise
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.sampling.solvers import Denoiser, OnStep, Step, refined, sample, weighted, within

RECOMPILATIONS = 32  # UNet and ControlNet share functions of diffusers, compiled for each batch size and for any


@dataclass(frozen=True)
class Execution:
    """How the networks are executed; results do not depend on it.

    Args:
        activation_checkpointing: Recompute activations in the backward pass instead of storing them: for small
            GPUs, at a quarter more arithmetic.
        channels_last: Store images and weights of UNet and ControlNet in channels-last order, which suits the
            matrix units of GPUs and does not pay on CPUs.
        compile: Compile UNet and ControlNet with torch.compile, which takes minutes at the first step.
    """

    activation_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False


class Inverter(nn.Module):
    """Reconstructs images from a classifier's feature maps (FeatInv, arXiv 2505.21032).

    Classifier and prior are frozen; the control is what training changes.

    Args:
        classifier: The network whose feature maps are inverted.
        prior: The latent diffusion prior.
        encoder: Size of the feature encoder in front of the ControlNet.
        image_size: Side of the reconstructions in pixels: the prior's resolution.
        conditioning: `spatial` gives the control the whole map; `pooled` its mean, copied to every location,
            which is the paper's comparison.
        sampler: How reconstructions are sampled.
        preview: A cheap autoencoder of the same latents, which gradients go through in place of the prior's own.

    Attributes:
        previews: Whether reconstructions are decoded by it, too.

    Raises:
        UserError: The latents of `preview` have another shape than the prior's.
    """

    def __init__(
        self,
        classifier: Backbone,
        prior: Prior,
        encoder: Encoder = Encoder(),  # noqa: B008 (frozen: it cannot be changed by a caller)
        image_size: int = 256,
        conditioning: Literal["spatial", "pooled"] = "spatial",
        sampler: Sampler = Sampler(),  # noqa: B008
        preview: LatentAutoencoder | None = None,
    ) -> None:
        super().__init__()
        if preview is not None:
            preview.check_latents_of(prior.autoencoder, "`preview_decoder`")
        self.preview, self.previews = preview, False
        self.classifier, self.prior = classifier, prior
        self.control = FeatureControl(prior.unet, classifier.feature_shape[0], encoder)
        self.image_size, self.conditioning, self.sampler = image_size, conditioning, sampler

    def execute(self, execution: Execution) -> None:
        """Change how UNet and ControlNet are executed."""
        for network in (self.prior.unet, self.control.controlnet):
            if execution.activation_checkpointing:
                network.enable_gradient_checkpointing(call_again)
            if execution.channels_last:
                network.to(memory_format=torch.channels_last)
            if execution.compile:
                torch.compiler.config.recompile_limit = RECOMPILATIONS
                network.compile()

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.prior.prompt.device

    def condition(self, features: Tensor) -> Tensor:
        """The part of a feature map (B, C, h, w) that the control may use."""
        if self.conditioning == "pooled":
            return features.mean(dim=(2, 3), keepdim=True).expand_as(features)
        return features

    def denoise(self, noisy_latents: Tensor, timesteps: Tensor, prompts: Tensor, encoded: Tensor) -> Tensor:
        """Predict noise or velocity with the controlled prior: see `Prior.predict` and `FeatureControl`."""
        residuals = self.control(noisy_latents, timesteps, prompts, encoded)
        return self.prior.predict(noisy_latents, timesteps, prompts, residuals)

    def denoiser(self, features: Tensor, noise: Tensor, sampler: Sampler) -> Denoiser:
        """The controlled, guided and refined prior for a batch of feature maps, which are encoded once."""
        features = self.condition(features)
        prompt, empty = (one.expand(len(features), -1, -1) for one in (self.prior.prompt, self.prior.empty))
        encoded = self.control.encoder(features, noise.shape[-2:])
        if sampler.guidance_scale == 1:
            denoiser = self._controlled(encoded, prompt, sampler)
        else:
            unconditional = encoded
            if sampler.guidance == "features":
                unconditional = self.control.encoder(torch.zeros_like(features), noise.shape[-2:])
            branches = self._controlled(torch.cat([unconditional, encoded]), torch.cat([empty, prompt]), sampler)
            denoiser = weighted(branches, sampler.guidance_scale, sampler.guidance_every)
            if sampler.guidance_interval != (0, 1):
                low, high = (fraction * self.prior.num_timesteps for fraction in sampler.guidance_interval)
                denoiser = within(denoiser, branches, low, high)
        if sampler.refine is not None:
            denoiser = refined(denoiser, self.prior.schedule, self.decoded_features, features, sampler.refine)
        return denoiser

    def _controlled(self, encoded: Tensor, prompts: Tensor, sampler: Sampler) -> Denoiser:
        """The controlled prior for a batch of encoded maps and prompts, or for latents of its last part alone."""
        kept: Residuals | None = None

        def denoise(latents: Tensor, step: Step) -> Tensor:
            nonlocal kept
            size, scale = len(latents), sampler.control_scale
            given = step.timestep, prompts[-size:]
            if scale and (kept is None or len(kept[1]) < size or step.number % sampler.control_every == 0):
                kept = self.control(latents, *given, encoded[-size:], scale)
            residuals = kept and ([one[-size:] for one in kept[0]], kept[1][-size:])
            return self.prior.predict(latents, *given, residuals)

        return denoise

    def decoded_features(self, latents: Tensor) -> Tensor:
        """The feature maps of the images of clean latents, as `condition` returns them. With gradients."""
        maps, _ = self.classifier((self.preview or self.prior.autoencoder).decode(latents))
        return self.condition(maps)

    @torch.no_grad()
    def reconstruct(
        self,
        features: Tensor,
        keys: list[str],
        seed: int,
        sampler: Sampler | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Reconstruct images (B, 3, H, W), about [-1, 1], from feature maps (B, C, h, w).

        Keys, one for each map, decide its noise together with the seed. Of several candidates, the one with the most
        similar map is kept. A `sampler` replaces the inverter's own; `on_step` sees every step of every candidate.
        """
        sampler = sampler or self.sampler
        shape = self.prior.latent_grid(self.image_size)
        candidates = [
            self.reconstruct_from(features, keyed_noise(names, shape, seed).to(features), sampler, on_step)
            for names in (keys, *([f"{key} candidate {n}" for key in keys] for n in range(1, sampler.best_of)))
        ]
        if len(candidates) == 1:
            return candidates[0]
        target = self.condition(features)
        maps = [self.condition(self.classifier.classify(images)["features"]) for images in candidates]
        cosines = torch.stack([functional.cosine_similarity(one, target).mean((1, 2)) for one in maps])
        best = cosines.argmax(0)
        return torch.stack(candidates)[best, torch.arange(len(best), device=best.device)]

    @torch.no_grad()
    def reconstruct_from(
        self, features: Tensor, noise: Tensor, sampler: Sampler | None = None, on_step: OnStep | None = None
    ) -> Tensor:
        """Reconstruct one candidate for each feature map from standard normal noise (B, channels, H / f, W / f)."""
        sampler = sampler or self.sampler
        latents = sample(self.denoiser(features, noise, sampler), noise, self.prior.schedule, sampler, on_step)
        return self.decode(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, channels, H / f, W / f) to images (B, 3, H, W), about [-1, 1]."""
        preview = self.preview if self.previews else None
        return (preview or self.prior.autoencoder).decode(latents)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the frozen parts."""
        return {
            "backbone": digest(self.classifier.model),
            "autoencoder": digest(self.prior.autoencoder),
            "unet": digest(self.prior.unet),
            "prompts": weights_digest({"prompt": self.prior.prompt, "empty": self.prior.empty}),
        }

    def identity(self) -> dict[str, Any]:
        """Settings, noise schedule and digests of the frozen parts, as JSON values: what a control was trained for."""
        return {
            "layer": self.classifier.layer,
            "input_size": self.classifier.input_size[0],
            "image_size": self.image_size,
            "conditioning": self.conditioning,
            "hidden_channels": self.control.encoder.config.hidden_channels,
            "num_layers": self.control.encoder.config.num_layers,
            "feature_shape": list(self.classifier.feature_shape),
            "transform": self.classifier.transform_name,
            **self.prior.autoencoder.normalisation,
            "schedule": plain(self.prior.schedule.config),
            **self.digests,
        }


def plain(config: Mapping[str, Any]) -> Any:
    """A configuration of diffusers as values for JSON, without its private fields."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.loads(json.dumps(public, default=str))
