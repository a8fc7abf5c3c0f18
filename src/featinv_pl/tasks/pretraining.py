"""Frozen parts for a domain that has none: a classifier, an autoencoder and a prior of one's own.

Each module trains one part on plain images. At the end of `fit`, the callback `SavePretrained` has it saved in the
layout that `Backbone` and `Prior` load.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from timm.models import save_for_hf
from torch import Tensor
from torch.nn import ModuleDict, functional
from torchmetrics import MeanMetric

from featinv_pl.errors import UserError
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.frozen import digest
from featinv_pl.nets.prior import PROMPTS, write_prompts
from featinv_pl.nets.supported import SCHEDULE, check_unet
from featinv_pl.sampling.diffusion import Weighting, denoising_target, timestep_weights
from featinv_pl.sampling.noise import generator, keyed_noise
from featinv_pl.tasks.optimisation import Optimised
from featinv_pl.types import ImageBatch, from_uint8

DROPOUT = 0.1
"""How often the prior trains without its prompt."""
MEASURED = 1024
"""Images of which the mean and standard deviation of latents are taken."""
SMALLEST_VARIANCE = 1e-8  # of a channel that is the same in all images, which is then not divided by 0


class Pretraining(Optimised, ABC):
    """The base of the three tasks: a loss of `scalars`, and their logging."""

    scalars: tuple[str, ...]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Exact where ranks have unlike numbers of samples, as Lightning's mean is not.
        self.means = ModuleDict({name: MeanMetric() for name in self.scalars})

    @abstractmethod
    def losses(self, batch: ImageBatch, identity: tuple[int | str, ...]) -> dict[str, Tensor]:
        """Scalars to log, of which `loss` is minimised. Random numbers depend on keys and `identity`."""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write the trained part into `folder`."""

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        losses = self.losses(batch, (torch.initial_seed(), self.current_epoch))
        self.log_step(losses)
        return losses["loss"]

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the same scalars, with randomness that repeats, so that curves are comparable."""
        for name, value in self.losses(batch, ("val",)).items():
            mean = cast(MeanMetric, self.means[name])
            mean(value, len(batch["key"]))
            self.log(f"val/{name}", mean)


class Classifier(Pretraining):
    """Trains a timm model to classify; saved, it serves as a backbone that knows its classes by name.

    Args:
        model: A timm model name.
        num_classes: Number of classes, which must be that of the training images.
        image_size: Side of the (square) images it is trained on, in pixels.
        model_args: Further arguments of the timm model, such as `output_stride: 8` for a finer map.
        kwargs: Optimizer and learning rate schedule, as for `Optimised`.
    """

    scalars = ("loss", "accuracy")

    def __init__(
        self, model: str, num_classes: int, image_size: int, model_args: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.image_size, self.num_classes = image_size, num_classes
        self.classes: tuple[str, ...] = ()
        self.model = timm.create_model(model, num_classes=num_classes, **(model_args or {}))

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self.on_fit_start()

    def on_fit_start(self) -> None:
        """Take over the classes of the images, refusing images of others and other classes than a checkpoint's."""
        data = cast(Any, self.trainer).datamodule
        if not hasattr(data, "classes"):  # such as loaders in a notebook
            return
        if self.classes and self.classes != data.classes:
            raise UserError(
                f"`data.train`: the images have the classes {_listed(data.classes)}, and the checkpoint was trained on "
                f"{_listed(self.classes)}. Give the folder that it was trained on."
            )
        if len(data.classes) != self.num_classes:
            raise UserError(
                f"`num_classes` is {self.num_classes}, and the images to train on have {len(data.classes)} classes "
                f"({_listed(data.classes)}). Give that number, or a folder of as many class folders."
            )
        for name, images in (("train", data.train), ("val", data.val)):
            for key, folder in images.names() if images else ():
                if folder not in data.classes:
                    raise UserError(f"`data.{name}`: '{key}' is not of any class of training. Remove it.")
        self.classes = data.classes

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classes"] = list(self.classes)  # in the order of the logits

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.classes = tuple(checkpoint.get("classes", ()))

    def losses(self, batch: ImageBatch, identity: tuple[int | str, ...]) -> dict[str, Tensor]:
        logits, labels = self.model(batch["images"]), batch["labels"]
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": functional.cross_entropy(logits, labels), "accuracy": accuracy}

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json`, with the names of the classes, and `model.safetensors` in timm's layout."""
        half = (0.5, 0.5, 0.5)  # what maps [0, 1] to the [-1, 1] that training saw
        size = (3, self.image_size, self.image_size)
        transform = {"input_size": size, "mean": half, "std": half, "crop_pct": 1.0}
        names = {"label_names": list(self.classes)}
        save_for_hf(self.model, str(folder), names, safe_serialization=True, data_config=transform)


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")


class Autoencoder(Pretraining):
    """Trains an AutoencoderKL, between images and the latents that diffusion works on.

    Args:
        config: Arguments of diffusers' AutoencoderKL.
        kl_weight: Weight of the Kullback-Leibler term, per latent value.
        kwargs: Optimizer and learning rate schedule, as for `Optimised`.
    """

    scalars = ("loss", "l1", "kl")
    latents: Tensor
    """(2, channels): running means of the latents and of their squares, by which the saved autoencoder normalises."""

    def __init__(self, config: dict[str, Any], kl_weight: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vae = AutoencoderKL(**config)
        self.kl_weight = kl_weight
        channels = int(self.vae.config.latent_channels)
        self.register_buffer("latents", torch.stack([torch.zeros(channels), torch.ones(channels)]))

    def losses(self, batch: ImageBatch, identity: tuple[int | str, ...]) -> dict[str, Tensor]:
        """Absolute error of the image, and the Kullback-Leibler divergence of the latents from N(0, 1)."""
        images = batch["images"]
        distribution = self.vae.encode(images).latent_dist
        noise = keyed_noise(batch["key"], distribution.mean.shape[1:], *identity).to(distribution.mean)
        latents = distribution.mean + distribution.std * noise
        if self.training:
            self.latents.lerp_(_moments(latents.detach()).to(self.latents), 0.01)
        error = functional.l1_loss(self.vae.decode(latents).sample, images)
        kl = distribution.kl().mean() / latents[0].numel()
        return {"loss": error + self.kl_weight * kl, "l1": error, "kl": kl}

    def save_pretrained(self, folder: Path) -> None:
        """Write diffusers' layout, with what normalises latents to mean 0 and variance 1, channel by channel."""
        mean, std = _mean_and_std(self.latents)
        self.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        self.vae.save_pretrained(folder)


def _moments(latents: Tensor) -> Tensor:
    """(2, channels): means of latents (B, channels, h, w) and of their squares."""
    return torch.stack([latents.mean((0, 2, 3)), latents.square().mean((0, 2, 3))])


def _mean_and_std(moments: Tensor) -> Tensor:
    """(2, channels): mean and standard deviation, given what `_moments` returns."""
    mean, square = moments
    return torch.stack([mean, (square - mean.square()).clamp(min=SMALLEST_VARIANCE).sqrt()])


class TinyAutoencoder(Pretraining):
    """Distils an autoencoder into diffusers' AutoencoderTiny, as TAESD is made: a cheap decoder of the same latents.

    Args:
        autoencoder: A folder in diffusers' layout, or a prior whose autoencoder it is.
        config: Arguments of AutoencoderTiny, with a width for each resolution of the autoencoder.
        kwargs: Optimizer and learning rate schedule, as for `Optimised`.
    """

    scalars = ("loss", "images", "latents")

    def __init__(self, autoencoder: str, config: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.autoencoder = LatentAutoencoder.load(autoencoder)
        self.tiny = AutoencoderTiny(**{"latent_channels": self.autoencoder.latent_channels, **config})
        LatentAutoencoder(self.tiny).check_latents_of(self.autoencoder, "`config`")
        self.tiny.requires_grad_(True).train()

    def losses(self, batch: ImageBatch, identity: tuple[int | str, ...]) -> dict[str, Tensor]:
        """Absolute errors of images that both decode from the same latents, and of the latents of images."""
        moments = self.autoencoder.encode(batch["images"])
        noise = keyed_noise(batch["key"], moments.chunk(2, dim=1)[0].shape[1:], *identity).to(moments)
        latents = self.autoencoder.sample(moments, noise)
        decoded = functional.l1_loss(self.tiny.decode(latents).sample, self.autoencoder.decode(latents))
        encoded = functional.l1_loss(self.tiny.encode(batch["images"]).latents, latents)
        return {"loss": decoded + encoded, "images": decoded, "latents": encoded}

    def save_pretrained(self, folder: Path) -> None:
        self.tiny.save_pretrained(folder)


class NoisePredictor(Pretraining):
    """Trains the UNet of a latent diffusion prior on images alone, or on the latents that feature shards hold of them.

    There is no text: zeros stand for the empty prompt, and fixed random numbers for one that asks for an image of this
    domain, which a tenth of training drops, as that of Stable Diffusion does.

    Args:
        autoencoder: A folder in diffusers' layout, as fitting an `Autoencoder` writes it, or the file of TAEF2. Where
            its configuration does not say how latents are normalised, their mean and standard deviation by channel are
            measured on the first training images and saved with the prior.
        config: Arguments of diffusers' UNet2DConditionModel.
        prediction_type: The noise, as Stable Diffusion predicts, or the velocity, which weighs the noisy timesteps
            more, where a feature map has most to say.
        weighting: How much the errors of timesteps count, as for a control.
        kwargs: Optimizer and learning rate schedule, as for `Optimised`.
    """

    scalars = ("loss",)
    prompt: Tensor
    latents: Tensor
    """(2, channels): mean and standard deviation, where they are measured."""

    def __init__(
        self,
        autoencoder: str,
        config: dict[str, Any],
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        weighting: Weighting = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.weighting = weighting
        self.autoencoder = LatentAutoencoder.load(autoencoder)
        channels = self.autoencoder.latent_channels
        given = {"in_channels": channels, "out_channels": channels, **config}
        check_unet(given, channels, "the configuration", "`config`")
        self.unet = UNet2DConditionModel(**given)
        width = self.unet.config.cross_attention_dim
        self.register_buffer("prompt", torch.randn(1, width, generator=generator("prompt", width)), persistent=False)
        if not self.autoencoder.normalised:
            self.register_buffer("latents", torch.full((2, channels), torch.nan))
        # Stable Diffusion's schedule, so that priors made here and MiniSD are sampled alike.
        self.schedule = DDIMScheduler(**SCHEDULE | {"prediction_type": prediction_type})

    def setup(self, stage: str) -> None:
        """Refuse the latents of another autoencoder, if there are stored ones."""
        manifests = getattr(getattr(self.trainer, "datamodule", None), "manifests", {})
        for folder, manifest in manifests.items():
            theirs, ours = manifest["provenance"]["autoencoder_digest"], digest(self.autoencoder)
            if theirs != ours:
                raise UserError(
                    f"`autoencoder`: the latents in the shard set '{folder}' are those of another autoencoder "
                    f"({theirs[:8]}, and this one is {ours[:8]}). Give the one that made them, or extract with this."
                )

    def on_fit_start(self) -> None:
        self._normalise()

    def on_validation_start(self) -> None:
        self._normalise()

    def _normalise(self) -> None:
        """Normalise the latents by what a checkpoint says of them, or by what the first training images show."""
        if self.autoencoder.normalised:
            return
        if self.latents.isnan().any():
            self.latents = self._measured()
        self.autoencoder.normalise(*self.latents)

    def _measured(self) -> Tensor:
        loader = cast(Any, self.trainer).datamodule.train_dataloader()
        count, sums = 0, torch.zeros(self.latents.shape, dtype=torch.float64)
        for batch in loader:
            given = {name: batch[name].to(self.device) for name in ("images", "moments") if name in batch}
            if "images" in given:
                given["images"] = from_uint8(given["images"])
            mean, _ = self._encoded(given).cpu().double().chunk(2, dim=1)
            sums += _moments(mean) * len(mean)
            count += len(mean)
            if count >= MEASURED:
                break
        return _mean_and_std(self.trainer.strategy.reduce((sums / count).to(self.latents), reduce_op="mean"))

    def _encoded(self, batch: Any) -> Tensor:
        """The moments of a batch: of shards they are stored, of images they are computed."""
        return batch["moments"] if "moments" in batch else self.autoencoder.encode(batch["images"])

    def losses(self, batch: ImageBatch, identity: tuple[int | str, ...]) -> dict[str, Tensor]:
        moments = self._encoded(batch)
        rngs = [generator(*identity, key) for key in batch["key"]]
        shape, steps = (2, *moments.chunk(2, dim=1)[0].shape[1:]), self.schedule.config.num_train_timesteps
        noise = torch.stack([torch.randn(shape, generator=rng) for rng in rngs], dim=1).to(moments)
        latents, noise = self.autoencoder.sample(moments, noise[0]), noise[1]
        timesteps = torch.cat([torch.randint(steps, (1,), generator=rng) for rng in rngs]).to(self.device)
        chances = torch.cat([torch.rand(1, generator=rng) for rng in rngs]).view(-1, 1, 1).to(self.device)
        prompts = self.prompt * (chances >= DROPOUT)
        noisy_latents = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy_latents, timesteps, prompts, return_dict=False)[0]
        target = denoising_target(self.schedule, latents, noise, timesteps)
        error = functional.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
        return {"loss": (error * timestep_weights(self.schedule, timesteps, self.weighting)).mean()}

    def save_pretrained(self, folder: Path) -> None:
        """Write a complete prior: `unet/`, `vae/`, `scheduler/` and the stored prompts."""
        self.unet.save_pretrained(folder / "unet")
        self.autoencoder.vae.save_pretrained(folder / "vae")
        self.schedule.save_pretrained(folder / "scheduler")
        write_prompts(folder / PROMPTS, prompt=self.prompt.cpu(), empty=torch.zeros_like(self.prompt, device="cpu"))
