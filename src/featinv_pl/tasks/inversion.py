"""Training of an inverter: p(image | feature map), learned by steering a frozen latent diffusion prior."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torchmetrics import MeanMetric

from featinv_pl.errors import UserError
from featinv_pl.inverter.identity import IDENTITY, check_checkpoint, check_control, check_shards, fill_control
from featinv_pl.inverter.inverter import Execution, Inverter
from featinv_pl.inverter.runs import Run
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import PENULTIMATE, Backbone
from featinv_pl.nets.control import Encoder
from featinv_pl.nets.frozen import keep_products_in
from featinv_pl.nets.prior import Prior
from featinv_pl.nets.trusted import not_trusted, trusted_imports
from featinv_pl.nets.weights import fill
from featinv_pl.sampling.diffusion import clean_estimate, denoising_target, timestep_weights
from featinv_pl.sampling.noise import Draws, keyed_noise
from featinv_pl.sampling.objective import Objective
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.tasks.distillation import Teacher
from featinv_pl.tasks.extraction import say_layer
from featinv_pl.tasks.optimisation import Optimised
from featinv_pl.types import Batch, key_hash

REGRESSION = "regression."
MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Adapt:
    """A trained control to start from.

    Args:
        control: Its model folder, as `featinv-pl export` and `import` write it.
        train: What is trained: the whole control, or its feature encoder alone, which adapts the control of
            another backbone or layer in a fraction of the steps.
    """

    control: Path
    train: Literal["control", "encoder"] = "control"


class FeatureInversion(Optimised):
    """Trains an `Inverter` (FeatInv, arXiv 2505.21032).

    Classifier and prior are frozen and named by string, so that a checkpoint holds the trained control alone,
    with digests of the two.

    Args:
        backbone: The classifier: a name of timm, torchvision (`torchvision/resnet50`) or transformers (`hf/org/name`),
            a folder such as fitting a `Classifier` writes, or the path of a class that makes it. In Python, a
            `Backbone` as well, which goes without `weights`, `layer` and `input_size`.
        prior: The latent diffusion prior: a hub name, a folder in diffusers' layout, or a file of Stable
            Diffusion 1.
        image_size: Side of the reconstructions in pixels: the prior's resolution.
        weights: The classifier's weights: `pretrained`, `random`, or a file.
        layer: The classifier's layer whose output is inverted.
        input_size: Side in pixels of the images that the classifier reads, if not that of its configuration.
        conditioning: `spatial` gives the control the whole feature map; `pooled` its mean, copied to every
            location, which is the paper's comparison.
        encoder: Size of the feature encoder.
        adapt: A trained control to start from.
        objective: What the control is trained for.
        sampler: How reconstructions are sampled.
        optimizer: Factory of the optimizer of the control.
        lr_scheduler: Factory of a learning rate schedule, advanced every step.
        execution: How the networks are executed.
        preview_decoder: A cheap autoencoder of the prior's latents, such as TAESD or what fitting a `TinyAutoencoder`
            writes. Gradients of refinement and of the consistency term go through its decoder, and validation within
            `fit` decodes by it; `validate` and `test` decode by the prior's own.
    """

    def __init__(
        self,
        backbone: str | Backbone,
        prior: str,
        image_size: int = 256,
        weights: str = "pretrained",
        layer: str = PENULTIMATE,
        input_size: int | None = None,
        conditioning: Literal["spatial", "pooled"] = "spatial",
        encoder: Encoder = Encoder(),  # noqa: B008 (frozen: it cannot be changed by a caller)
        adapt: Adapt | None = None,
        objective: Objective = Objective(),  # noqa: B008
        sampler: Sampler = Sampler(),  # noqa: B008
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        execution: Execution = Execution(),  # noqa: B008
        preview_decoder: str | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        classifier = Backbone.of(backbone, weights, layer, input_size)
        preview = LatentAutoencoder.load(preview_decoder, "`preview_decoder`") if preview_decoder else None
        self.inverter = Inverter(classifier, Prior(prior), encoder, image_size, conditioning, sampler, preview)
        if adapt is not None:
            check_control(adapt.control, self.inverter, "`adapt.control`")
            encoder_alone = adapt.train == "encoder"
            self.inverter.control.load_pretrained(adapt.control, "`adapt.control`", adapt=encoder_alone)
            self.inverter.control.controlnet.requires_grad_(not encoder_alone)
        self.teacher: Teacher | None = None
        if objective.distilled_guidance is not None:
            if adapt is None or encoder_alone:
                raise UserError("`objective.distilled_guidance` needs a trained control. Give `adapt.control` alone.")
            self.teacher = Teacher(self.inverter, objective.distilled_guidance)
        self.inverter.execute(execution)
        self.objective = objective
        self.regression: nn.Conv2d | None = None
        if objective.regression:
            latents = self.inverter.prior.autoencoder.latent_channels
            self.regression = nn.Conv2d(encoder.hidden_channels, latents, 3, padding=1)
        self.loaded_step, self.fits = 0, False  # step of the checkpoint; whether the stage at hand is training
        self.val_loss = MeanMetric()  # exact where ranks have unlike numbers of samples, as Lightning's mean is not

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of denoising, as in the paper: the loss is the error of the predicted noise."""
        inverter, prior, objective = self.inverter, self.inverter.prior, self.objective
        moments, features = batch["moments"], inverter.condition(batch["features"])
        noise, timesteps, chances = self._draws(batch)
        dropped = chances < objective.dropout

        latents = prior.autoencoder.sample(moments, noise[0])
        prompts = torch.where(dropped.view(-1, 1, 1), prior.empty, prior.prompt)
        given = torch.where(dropped.view(-1, 1, 1, 1), 0, features)
        noisy_latents = prior.schedule.add_noise(latents, noise[1], timesteps)
        hidden = inverter.control.encoder.read(given, noisy_latents.shape[-2:])
        encoded = inverter.control.encoder.write(hidden)
        prediction = inverter.denoise(noisy_latents, timesteps, prompts, encoded)

        target = denoising_target(prior.schedule, latents, noise[1], timesteps)
        if self.teacher is not None:
            guided = self.teacher.predict(prior, noisy_latents, timesteps, features)
            target = torch.where(dropped.view(-1, 1, 1, 1), target, guided)
        error = functional.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
        loss, figures = (error * timestep_weights(prior.schedule, timesteps, objective.weighting)).mean(), {}
        if self.regression is not None:
            error = functional.mse_loss(self.regression(hidden), latents, reduction="none").flatten(1).mean(1)
            figures["regression"] = (error * ~dropped).mean()
            loss = loss + objective.regression * figures["regression"]
        if objective.consistency:
            # As many as are expected to have little noise: how many have is not known without waiting for the device.
            near = (timesteps < objective.consistency_below * prior.num_timesteps) & ~dropped
            least = torch.where(near, timesteps, prior.num_timesteps).argsort(stable=True)
            least = least[: math.ceil(objective.consistency_below * len(least))]
            estimate = clean_estimate(prior.schedule, noisy_latents, prediction, timesteps)[least]
            maps = inverter.decoded_features(torch.where(near[least].view(-1, 1, 1, 1), estimate, 0))
            distances = 1 - functional.cosine_similarity(maps, features[least]).mean((1, 2))
            figures["consistency"] = (distances * near[least]).sum() / len(near)
            loss = loss + objective.consistency * figures["consistency"]
        self.log_step({"loss": loss, **figures})
        return loss

    @property
    def num_timesteps(self) -> int:
        """Length T of the prior's noise schedule, which a loader of training batches draws from."""
        return self.inverter.prior.num_timesteps

    def _draws(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, timesteps and chances of dropout: each sample has its own in an epoch, whichever rank it is on.

        `FeatureShards` has drawn them where it reads, and they came to the device with the rest of the batch.
        """
        now, moments = (torch.initial_seed(), self.current_epoch, self.num_timesteps), batch["moments"]
        if tuple(batch.get("drawn", ())) == now:  # a loader makes a list of it
            return batch["noise"].to(moments), batch["timesteps"], batch["chances"]
        noise, timesteps, chances = Draws(*now)(batch["key"], self.inverter.prior.latent_shape(moments))
        return noise.to(moments), timesteps.to(self.device), chances.to(self.device)

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss of a batch at noise and timesteps that never change, so that curves compare."""
        inverter, prior = self.inverter, self.inverter.prior
        moments, features = batch["moments"], inverter.condition(batch["features"])
        noise = keyed_noise(batch["key"], prior.latent_shape(moments), 0).to(moments)
        timesteps = torch.tensor([key_hash(key) % prior.num_timesteps for key in batch["key"]]).to(self.device)
        latents = prior.autoencoder.sample(moments, torch.zeros_like(noise))
        noisy_latents = prior.schedule.add_noise(latents, noise, timesteps)
        prompts = prior.prompt.expand(len(moments), -1, -1)
        encoded = inverter.control.encoder(features, noisy_latents.shape[-2:])
        prediction = inverter.denoise(noisy_latents, timesteps, prompts, encoded)
        loss = functional.mse_loss(prediction, denoising_target(prior.schedule, latents, noise, timesteps))
        self.val_loss(loss, len(moments))
        self.log("val/loss", self.val_loss, add_dataloader_idx=False)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing: the `Evaluation` callback reconstructs and scores."""

    def setup(self, stage: str) -> None:
        """Refuse shard sets that other frozen parts have made, and hold the prior in the precision of the run."""
        self.fits = self.inverter.previews = stage == "fit"
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:  # loaders given by hand answer for themselves
            if not hasattr(data, "manifests"):
                raise UserError(
                    f"data: FeatureInversion reads feature shards, and {type(data).__name__} gives images. "
                    "Extract their features first (featinv-pl predict), then give FeatureShards."
                )
            check_shards(data.manifests, self.inverter)
        say_layer(self.inverter.classifier)
        if self.trainer.precision in MIXED:
            _ = self.inverter.digests  # of the weights before they are converted
            for frozen in (self.inverter.prior, *([self.teacher] if self.teacher else [])):
                keep_products_in(frozen, MIXED[self.trainer.precision])

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Free gradients once they are used: Lightning would hold them through the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained half alone, `control.*` and `regression.*`: frozen parts are named, not stored."""
        state, trained = super().state_dict(*args, **kwargs), ("inverter.control.", REGRESSION)
        return {name.removeprefix("inverter."): one for name, one in state.items() if name.startswith(trained)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the trained half, strictly: a missing or unexpected weight is an error."""
        own = {name.removeprefix(REGRESSION): one for name, one in state_dict.items() if name.startswith(REGRESSION)}
        # A control that was trained without one can be tested all the same, and is not trained further.
        if self.regression is not None and (own or self.fits):
            fill(self.regression, own, "regression", "`ckpt_path`")
        return fill_control(self.inverter, state_dict, "`ckpt_path`")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # without options of hyperparameters, of which there are none
        cls, checkpoint_path: str | Path, map_location: Any = None, **given: Any
    ) -> Self:
        """Load a trained model, with the arguments of the `fit.yaml` beside the checkpoint and those that are `given`.

        A checkpoint of a Trainer in Python has no such file: give `backbone`, `prior` and what else differs from the
        defaults.
        """
        if not {"backbone", "prior"} <= given.keys():
            run = Run.find(Path(checkpoint_path), "`checkpoint_path`")
            given = {**_arguments(run), **given}
            with torch.random.fork_rng(devices=[]):
                run.seed()  # which a classifier with random weights got
                return super().load_from_checkpoint(checkpoint_path, map_location, **given)
        return super().load_from_checkpoint(checkpoint_path, map_location, **given)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the control belongs to."""
        checkpoint[IDENTITY] = self.inverter.identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, before training starts."""
        check_checkpoint(checkpoint, self.inverter, "`ckpt_path`")
        if self.fits:
            self.check_moments(checkpoint)
        self.loaded_step = checkpoint["global_step"]


def _arguments(run: Run) -> dict[str, Any]:
    """The arguments of a saved configuration, made as the command line makes them, of optimizers by torch and timm."""
    options = dict(run.options)
    for name in ("optimizer", "lr_scheduler"):
        named = options.get(name)
        path = str(named.get("class_path") if isinstance(named, dict) else named or "torch.optim.")
        if not path.startswith(("torch.optim.", "timm.optim.", "timm.scheduler.", *trusted_imports())):
            raise not_trusted(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FeatureInversion, "model", instantiate=False)
    with run.as_saved("`checkpoint_path`"):
        try:
            made = parser.instantiate_classes(parser.parse_object({"model": options}))
        except ArgumentError as error:
            raise TypeError(str(error)) from error
    return dict(vars(made.model))
