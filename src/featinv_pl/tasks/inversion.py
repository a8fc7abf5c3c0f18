"""The method: p(image | feature map), learned by steering a frozen latent diffusion prior."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW
from torchmetrics import MeanMetric

from featinv_pl.errors import UserError
from featinv_pl.evaluation.arms import check_names
from featinv_pl.inverter.compatibility import check_control, check_shards
from featinv_pl.inverter.identity import differences, identity
from featinv_pl.nets.backbone import PENULTIMATE, Backbone
from featinv_pl.nets.control import FeatureControl
from featinv_pl.nets.frozen import digest, keep_products_in, weights_digest
from featinv_pl.nets.prior import Prior
from featinv_pl.nets.sources import fill, no_larger, size_below
from featinv_pl.runtime.clipping import Clipped
from featinv_pl.sampling.diffusion import clean_estimate, denoising_target, min_snr_weights
from featinv_pl.sampling.guidance import Denoiser, weighted, within
from featinv_pl.sampling.noise import generator, keyed_noise
from featinv_pl.sampling.refinement import refined
from featinv_pl.sampling.sampler import Sampler, sample
from featinv_pl.tasks.optimisation import optimise, plain
from featinv_pl.types import Batch, Observation, Reconstruction, from_uint8, key_hash

MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class FeatureInversion(Clipped):
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
        train: What is trained: the whole control, or its feature encoder alone, which adapts the control
            of another backbone or layer (give that as `control`) in a fraction of the steps.
        conditioning: `spatial` gives the control the whole map; `pooled` its mean, copied to every
            location, which is what the paper compares against.
        null_map: What stands for no map: zeros, as the authors have it, or a learned vector, copied to
            every location.
        dropout: Probability with which training replaces map and prompt together, by the null map and by
            the empty prompt.
        dropout_features: Probability with which the map alone is replaced.
        dropout_prompt: Probability with which the prompt alone is replaced.
        min_snr_gamma: Weighs timesteps by their signal-to-noise ratio, cut at this value (Min-SNR, arXiv
            2303.09556); with null all count alike, as for the authors.
        consistency: Weight of the feature-consistency loss: 1 - cosine between the map that is given
            and the backbone's map of the decoded estimate, at timesteps of little noise.
        consistency_below: Up to where there is little noise, as a fraction of the schedule.
        hidden_channels: Width of the feature encoder.
        num_layers: Its number of convolutions.
        sampler: How reconstructions are drawn.
        optimizer: Factory of the optimizer of the control.
        lr_scheduler: Factory of a learning rate schedule, advanced every step.
        judge: A second classifier, which the inversion has never seen: it scores originals and
            reconstructions too. A timm name or a folder, as for the backbone.
        num_samples: Reconstructions that `test` draws from each map. The first is scored; from two on,
            so is how much they differ.
        activation_checkpointing: Compute activations again in the backward pass instead of keeping them: for
            small GPUs, at a quarter more arithmetic.
        channels_last: Store images and weights of UNet and ControlNet channel by channel last, as the matrix units
            of GPUs want them; on a CPU it does not pay.
        compile: Compile UNet and ControlNet with torch.compile, which takes minutes at the first step.
        arms: Other samplers by name, whose reconstructions `test` scores beside those of `sampler`, such
            as one with refinement, or one without the control.
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
        train: Literal["control", "encoder"] = "control",
        conditioning: Literal["spatial", "pooled"] = "spatial",
        null_map: Literal["zeros", "learned"] = "zeros",
        dropout: float = 0.15,
        dropout_features: float = 0.0,
        dropout_prompt: float = 0.0,
        min_snr_gamma: float | None = 5.0,
        consistency: float = 0.0,
        consistency_below: float = 0.3,
        hidden_channels: int = 512,
        num_layers: int = 3,
        sampler: Sampler = Sampler(),  # noqa: B008 (frozen: it cannot be changed by a caller)
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        judge: str | None = None,
        num_samples: int = 1,
        activation_checkpointing: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        arms: dict[str, Sampler] | None = None,
    ) -> None:
        super().__init__()
        self.drop_probabilities = (dropout, dropout_features, dropout_prompt)
        if min(self.drop_probabilities) < 0 or sum(self.drop_probabilities) >= 1:
            raise UserError(
                "--model.dropout, --model.dropout_features and --model.dropout_prompt are probabilities whose sum is "
                f"below 1, and are {dropout}, {dropout_features} and {dropout_prompt}."
            )
        if num_samples < 1:
            raise UserError(f"--model.num_samples must be at least 1, and is {num_samples}.")
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise UserError(f"--model.min_snr_gamma must be above 0, and is {min_snr_gamma}. The usual value is 5.")
        if consistency < 0 or not 0 < consistency_below <= 1:
            raise UserError(
                "--model.consistency must be at least 0 and --model.consistency_below a fraction of the noise "
                f"schedule, and are {consistency} and {consistency_below}."
            )
        if train == "encoder" and control is None:
            raise UserError("--model.train: `encoder` needs a trained control. Give its folder as --model.control.")
        self.backbone = Backbone(backbone, weights, layer, input_size)
        self.prior = Prior(prior)
        self.image_size = image_size
        channels, learned_null = self.backbone.feature_shape[0], null_map == "learned"
        # That of a folder fits its files; to another backbone's map its encoder is made anew, at any width.
        whole = control is not None and train == "control"
        with no_larger(size_below(Path(control or ".")), f"'{control}'", "--model.control") if whole else nullcontext():
            self.control = FeatureControl(self.prior.unet, channels, hidden_channels, num_layers, learned_null)
        if control is not None:
            check_control(control, prior, self.frozen["unet"], "--model.control")
            self.control.load_pretrained(control, "--model.control", adapt=train == "encoder")
        if train == "encoder":
            self.control.controlnet.requires_grad_(False)
        for network in (self.prior.unet, self.control.controlnet):
            if activation_checkpointing:
                network.enable_gradient_checkpointing()
            if channels_last:
                network.to(memory_format=torch.channels_last)
            if compile:
                # Both networks share one function of diffusers', which is compiled for training, validation and
                # drawing, each with one batch size and then with any.
                torch._dynamo.config.recompile_limit = 32
                network.compile()
        self.conditioning = conditioning
        self.loaded_step = 0  # of the checkpoint
        self.null_map = null_map
        self.min_snr_gamma = min_snr_gamma
        self.consistency = consistency
        self.consistency_below = consistency_below
        self.sampler = sampler
        self.optimizer_factory, self.lr_scheduler_factory = plain(optimizer), plain(lr_scheduler)
        self.judge = Backbone(judge) if judge else None
        self.val_loss = MeanMetric()  # exact where ranks have unlike numbers of samples, as Lightning's mean is not
        self.num_samples = num_samples
        self.arms = arms or {}
        check_names(self.arms)

    # The method

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of denoising, as in the paper: the loss is the error of the predicted noise."""
        # Of each sample's own, so that it does not matter which rank has it.
        rngs = [generator(torch.initial_seed(), self.current_epoch, key) for key in batch["key"]]
        moments, features = batch["moments"], self.condition(batch["features"])
        size, shape = len(moments), (2, *self.prior.latent_shape(moments))

        noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs], dim=1).to(moments)
        timesteps = torch.cat([torch.randint(self.prior.num_timesteps, (1,), generator=rng) for rng in rngs])
        timesteps = timesteps.to(self.device)
        no_map, no_prompt = self.dropped(torch.cat([torch.rand(1, generator=rng) for rng in rngs]).to(self.device))

        latents = self.prior.autoencoder.sample(moments, noise[0])
        prompts = torch.where(no_prompt.view(-1, 1, 1), self.prior.empty, self.prior.prompt)
        given = torch.where(no_map.view(-1, 1, 1, 1), self.control.encoder.null, features)
        noisy_latents = self.prior.schedule.add_noise(latents, noise[1], timesteps)
        prediction = self.denoise(noisy_latents, timesteps, prompts, given)

        target = denoising_target(self.prior.schedule, latents, noise[1], timesteps)
        error = functional.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
        if self.min_snr_gamma is not None:
            error = error * min_snr_weights(self.prior.schedule, timesteps, self.min_snr_gamma)
        loss = error.mean()
        if self.consistency:
            near = (timesteps < self.consistency_below * self.prior.num_timesteps) & ~no_map
            estimate = clean_estimate(self.prior.schedule, noisy_latents, prediction, timesteps)
            loss = loss + self.consistency * self.inconsistency(estimate[near], features[near]) / size
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def dropped(self, chances: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples train without map, and which without prompt.

        Args:
            chances: (B,), uniform in [0, 1).
        """
        both, features, prompt = self.drop_probabilities
        no_map = chances < both + features
        no_prompt = (chances < both) | ((chances >= both + features) & (chances < both + features + prompt))
        return no_map, no_prompt

    def denoise(self, noisy_latents: Tensor, timesteps: Tensor, prompts: Tensor, features: Tensor) -> Tensor:
        """What the controlled prior predicts: noise or velocity.

        Args:
            noisy_latents: (B, channels, H / f, W / f), scaled.
            timesteps: (B,).
            prompts: (B, L, D).
            features: (B, C, h, w), as `condition` returns them.
        """
        encoded = self.control.encoder(features, noisy_latents.shape[-2:])
        residuals = self.control(noisy_latents, timesteps, prompts, encoded)
        return self.prior.predict(noisy_latents, timesteps, prompts, residuals)

    def condition(self, features: Tensor) -> Tensor:
        """What the control may see of the feature map (B, C, h, w)."""
        if self.conditioning == "pooled":
            return features.mean(dim=(2, 3), keepdim=True).expand_as(features)
        return features

    def decoded_features(self, latents: Tensor) -> Tensor:
        """The feature maps of the images of clean latents, of which `condition` says what counts. With gradients."""
        maps, _ = self.backbone(self.prior.autoencoder.decode(latents))
        return self.condition(maps)

    def inconsistency(self, estimate: Tensor, features: Tensor) -> Tensor:
        """How far the maps of estimated clean latents are from those given: the sum over samples of 1 - cosine.

        Args:
            estimate: (B, channels, H / f, W / f), scaled; B may be 0.
            features: (B, C, h, w), as `condition` returns them.
        """
        if len(estimate) == 0:
            return estimate.sum()
        distances = 1 - functional.cosine_similarity(self.decoded_features(estimate), features).mean((1, 2))
        self.log("train/consistency", distances.mean())
        return distances.sum()

    @torch.no_grad()
    def reconstruct(self, features: Tensor, keys: list[str], seed: int, sampler: Sampler) -> Tensor:
        """Draw images whose feature maps should be those given, of several candidates the best.

        Args:
            features: (B, C, h, w).
            keys: One name for each map: with the seed, it decides the noise.
            seed: Of the noise.
            sampler: How.

        Returns:
            (B, 3, H, W), about [-1, 1].
        """
        grid = self.prior.latent_grid(self.image_size)
        candidates = [
            self.reconstruct_from(features, keyed_noise(names, grid, seed).to(features), sampler)
            for names in (keys, *([f"{key} candidate {n}" for key in keys] for n in range(1, sampler.best_of)))
        ]
        if len(candidates) == 1:
            return candidates[0]
        target = self.condition(features)
        maps = [self.condition(self.backbone.classify(images)["features"]) for images in candidates]
        cosines = torch.stack([functional.cosine_similarity(one, target).mean((1, 2)) for one in maps])
        best = cosines.argmax(0)
        return torch.stack(candidates)[best, torch.arange(len(best), device=best.device)]

    @torch.no_grad()
    def reconstruct_from(self, features: Tensor, noise: Tensor, sampler: Sampler | None = None) -> Tensor:
        """Draw images whose feature maps should be those given.

        Args:
            features: (B, C, h, w).
            noise: (B, latent channels, H / f, W / f), standard normal.
            sampler: How, if not as the module's own; of its candidates, this is one.

        Returns:
            (B, 3, H, W), about [-1, 1].
        """
        sampler = sampler or self.sampler
        latents = sample(self.denoiser(features, noise, sampler), noise, self.prior.schedule, sampler)
        return self.prior.autoencoder.decode(latents)

    def denoiser(self, features: Tensor, noise: Tensor, sampler: Sampler) -> Denoiser:
        """The controlled, guided and refined prior for a batch of feature maps, which it encodes once."""
        features = self.condition(features)
        prompt, empty = (one.expand(len(features), -1, -1) for one in (self.prior.prompt, self.prior.empty))
        encoded = self.control.encoder(features, noise.shape[-2:])
        denoiser = self._controlled([encoded], [prompt], sampler.control_scale)
        if sampler.guided:
            null = encoded
            if sampler.guidance != "text":
                null = self.control.encoder(self.control.encoder.null.expand_as(features), noise.shape[-2:])
            between = sampler.guidance == "both"
            branches = self._controlled(
                [null, *[encoded] * between, encoded], [empty, *[empty] * between, prompt], sampler.control_scale
            )
            low, high = (fraction * self.prior.num_timesteps for fraction in sampler.guidance_interval)
            denoiser = within(weighted(branches, sampler.guidance_weights), denoiser, low, high)
        if sampler.refine is not None:
            denoiser = refined(denoiser, self.prior.schedule, self.decoded_features, features, sampler.refine)
        return denoiser

    def _controlled(self, encoded: list[Tensor], prompts: list[Tensor], scale: float) -> Denoiser:
        """The prior under control, for one or several conditions of each sample of a batch."""
        maps, texts = torch.cat(encoded), torch.cat(prompts)
        to_control, to_prior = self.control.project(texts), self.prior.project(texts)

        def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
            residuals = self.control(latents, timestep, to_control, maps, scale) if scale else None
            return self.prior.predict(latents, timestep, to_prior, residuals)

        return denoise

    # Evaluation

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Reconstruction:
        """Reconstruct a batch, and log its loss at noise and timesteps that never change, so that curves compare."""
        moments, features = batch["moments"], self.condition(batch["features"])
        noise = keyed_noise(batch["key"], self.prior.latent_shape(moments), 0).to(moments)
        timesteps = torch.tensor([key_hash(key) % self.prior.num_timesteps for key in batch["key"]]).to(self.device)
        latents = self.prior.autoencoder.sample(moments, torch.zeros_like(noise))
        noisy_latents = self.prior.schedule.add_noise(latents, noise, timesteps)
        prompts = self.prior.prompt.expand(len(moments), -1, -1)
        prediction = self.denoise(noisy_latents, timesteps, prompts, features)
        loss = functional.mse_loss(prediction, denoising_target(self.prior.schedule, latents, noise, timesteps))
        self.val_loss(loss, len(moments))
        self.log("val/loss", self.val_loss, add_dataloader_idx=False)
        return self._reconstruct(batch)

    @torch.no_grad()
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Reconstruction:
        """Reconstruct a batch, in all the ways and as many times as are asked for."""
        outputs = self._reconstruct(batch)
        if self.arms:
            outputs["arms"] = {name: self._draw(batch, sampler, name) for name, sampler in self.arms.items()}
        if self.num_samples > 1:
            seed, features = torch.initial_seed(), batch["features"]
            samples: list[Observation] = [outputs]
            for number in range(1, self.num_samples):
                keys = [f"{key} sample {number}" for key in batch["key"]]
                samples.append(self.backbone.classify(self.reconstruct(features, keys, seed, self.sampler)))
            outputs["sample_images"] = torch.stack([observation["images"] for observation in samples], dim=1)
            outputs["sample_features"] = torch.stack([observation["features"] for observation in samples], dim=1)
        return outputs

    def _reconstruct(self, batch: Batch) -> Reconstruction:
        """Reconstruct a batch from its maps, and once more by the autoencoder alone."""
        moments = batch["moments"]
        mean = self.prior.autoencoder.sample(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
        ceiling = self.backbone.classify(self.prior.autoencoder.decode(mean))
        observation = self._draw(batch, self.sampler)
        return {
            "images": observation["images"],
            "features": observation["features"],
            "logits": observation["logits"],
            "ceiling": ceiling,
        }

    def _draw(self, batch: Batch, sampler: Sampler, arm: str = "") -> Observation:
        """Reconstructions of a batch as the backbone sees them; those that are drawn already are not drawn again."""
        stored = batch.get("drawn", {}).get(arm, {})
        drawn = {row: from_uint8(image.to(self.device)) for row, image in stored.items()}
        missing = [row for row in range(len(batch["key"])) if row not in drawn]
        if missing:
            keys = [batch["key"][row] for row in missing]
            images = self.reconstruct(batch["features"][missing], keys, torch.initial_seed(), sampler)
            drawn |= dict(zip(missing, images, strict=True))
        images = torch.stack([drawn[row] for row in range(len(batch["key"]))])
        observation = self.backbone.classify(images)
        # As bytes they would look like any image.
        observation["features"][~images.flatten(1).isfinite().all(1)] = torch.nan
        return observation

    # What Lightning asks for

    def setup(self, stage: str) -> None:
        """Refuse shard sets that other frozen parts have made, and hold the prior in the precision of the run."""
        self._check_data()
        if self.trainer.precision in MIXED:
            _ = self.frozen  # the digests of the weights as they came
            keep_products_in(self.prior, MIXED[self.trainer.precision])

    def _check_data(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:  # loaders given by hand answer for themselves
            return
        if not hasattr(datamodule, "manifests"):
            raise UserError(
                f"--data: FeatureInversion reads feature shards, and {type(datamodule).__name__} gives images. "
                "Extract their features first (featinv-pl predict), then give FeatureShards."
            )
        check_shards(datamodule.manifests, self.backbone, self.prior, self.image_size, self.frozen)

    def configure_optimizers(self) -> Any:
        """Optimise the control, or its encoder alone."""
        trained = [parameter for parameter in self.control.parameters() if parameter.requires_grad]
        return optimise(trained, self.optimizer_factory, self.lr_scheduler_factory)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Give gradients back once they are used: Lightning would hold them through the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    @cached_property
    def frozen(self) -> dict[str, str]:
        """Digests of the frozen parts."""
        return {
            "backbone": digest(self.backbone.model),
            "autoencoder": digest(self.prior.autoencoder),
            "unet": digest(self.prior.unet),
            "prompts": weights_digest({"prompt": self.prior.prompt, "empty": self.prior.empty}),
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
        checkpoint["inversion"] = identity(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, before training starts."""
        theirs = checkpoint.get("inversion")
        if not isinstance(theirs, dict):
            raise UserError("--ckpt_path: the checkpoint is not one of a FeatureInversion.")
        if different := differences(theirs, identity(self)):
            raise UserError(
                f"--ckpt_path: the checkpoint belongs to another model ({'; '.join(different)}). "
                "Give the configuration that it was trained with."
            )
        self.loaded_step = checkpoint["global_step"]
