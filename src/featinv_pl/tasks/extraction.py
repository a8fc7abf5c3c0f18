"""Extraction by `featinv-pl predict`: images in, feature maps, logits and moments out; also of attacked images."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from diffusers import AutoencoderKL
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from featinv_pl.data.images.sources import ImageSource
from featinv_pl.errors import UserError
from featinv_pl.nets.autoencoder import LatentAutoencoder
from featinv_pl.nets.backbone import PENULTIMATE, Backbone
from featinv_pl.nets.folding import fold_norms
from featinv_pl.nets.frozen import digest
from featinv_pl.runtime.ranks import say
from featinv_pl.sampling.noise import generator
from featinv_pl.types import Batch, ImageBatch, Provenance, from_uint8, to_uint8

log = logging.getLogger(__name__)

MEASURED = 16  # images
SMALL = 0.2  # of the spread of the distribution that latents are sampled from


class FeatureExtraction(LightningModule):
    """Classifies images, and encodes them to the moments of their latents.

    Args:
        backbone: The classifier, as for `FeatureInversion`.
        autoencoder: The prior's autoencoder: a folder in diffusers' layout, or whatever names a prior.
        image_size: Side of the images that are stored and encoded, in pixels: the prior's resolution.
        weights: The classifier's weights: `pretrained`, `random`, or a file.
        layer: The classifier's layer whose output is the feature map.
        input_size: Side in pixels of the images that the classifier gets, if not that of its configuration.
        autoencoder_dtype: What the autoencoder computes in. By default that is `float32`, and on a GPU `bfloat16` if
            its error, measured on the first images, is below a fifth of the spread of what latents are sampled from.
    """

    def __init__(
        self,
        backbone: str | Backbone,
        autoencoder: str,
        image_size: int = 256,
        weights: str = "pretrained",
        layer: str = PENULTIMATE,
        input_size: int | None = None,
        autoencoder_dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = Backbone.of(backbone, weights, layer, input_size)
        self.autoencoder = LatentAutoencoder.load(autoencoder)
        self.image_size, self.autoencoder_dtype = image_size, autoencoder_dtype
        self.digests = digest(self.backbone.model), digest(self.autoencoder)  # of what was given, in full precision
        self.own = isinstance(backbone, str)  # and not the module of a caller, who may use it elsewhere

    def setup(self, stage: str) -> None:
        """Log the layer."""
        say_layer(self.backbone)

    def choose_dtype(self, images: ImageSource, device: torch.device) -> str:
        """Take bfloat16 for the autoencoder on a GPU if its error is too small to matter, unless the dtype was given.

        All processes measure it on the same images, and come to the same result.
        """
        if self.autoencoder_dtype is None:
            self.autoencoder_dtype = "float32" if device.type == "cpu" else self.measured_dtype(images, device)
        return self.autoencoder_dtype

    def measured_dtype(self, images: ImageSource, device: torch.device) -> Literal["float32", "bfloat16"]:
        """`bfloat16` if its error is small on the first images of a source; they are encoded on the device."""
        shown = torch.stack([images[number].images for number in range(min(MEASURED, len(images)))])
        error = self.autoencoder.to(device).rounding(self._stored(from_uint8(shown.to(device))))
        say(f"autoencoder: bfloat16 is off by {error:.2g} of the spread of latents, of which {SMALL:g} is taken")
        return "bfloat16" if error < SMALL else "float32"

    def on_predict_start(self) -> None:
        if self.own:
            height, width = self.backbone.input_size
            noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(self.device) * 2 - 1
            fold_norms(self.backbone.model, lambda: self.backbone(noise))
        if self.autoencoder_dtype == "bfloat16":
            self.autoencoder.to(torch.bfloat16)
        if self.device.type == "cpu" and not isinstance(self.autoencoder.vae, AutoencoderKL):
            self.autoencoder.to(memory_format=torch.channels_last)  # faster without norms, and as fast with those of KL

    def _stored(self, images: Tensor) -> Tensor:
        """Images at the prior's resolution, as bytes have them."""
        return from_uint8(to_uint8(resize(images, [self.image_size, self.image_size], InterpolationMode.BICUBIC)))

    def predict_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> Batch:
        """Classify a batch; its images are stored at the prior's resolution."""
        features, logits = self.backbone(batch["images"])
        images = self._stored(batch["images"])
        moments = self.autoencoder.encode(images.to(self.autoencoder.vae.dtype)).float().contiguous()
        made = {"images": images, "features": features.contiguous(), "logits": logits, "moments": moments}
        made["labels"] = self._labels(batch)
        return cast(Batch, {**batch, **made})

    def _labels(self, batch: ImageBatch) -> Tensor:
        """(B,) labels as the classifier counts them: those of the data module are numbered by its own classes."""
        return torch.tensor([self.backbone.classes.label(name) for name in batch["class_name"]]).to(batch["labels"])

    @property
    def provenance(self) -> Provenance:
        return {
            "backbone": self.backbone.name,
            "backbone_digest": self.digests[0],
            "layer": self.backbone.layer,
            "feature_shape": list(self.backbone.feature_shape),
            "num_classes": self.backbone.num_classes,
            "transform": self.backbone.transform_name,
            "autoencoder_digest": self.digests[1],
            "image_size": self.image_size,
            "attack": "",
        }


@dataclass(frozen=True)
class Attack:
    """Projected gradient descent in the maximum norm (Madry et al., arXiv 1706.06083).

    Args:
        epsilon: Largest change of any value, in grey levels of 255.
        step: Change in each step, in grey levels.
        steps: Number of steps.
    """

    epsilon: int = 4
    step: float = 1.0
    steps: int = 20

    def __post_init__(self) -> None:
        if self.epsilon < 1 or self.step <= 0 or self.steps < 1:
            raise UserError(
                f"`attack`: epsilon and steps must be at least 1, step above 0, and are {self.epsilon}, {self.steps} "
                f"and {self.step}."
            )


def attack(
    classify: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, start: Tensor, settings: Attack
) -> Tensor:
    """Change images (B, 3, H, W) in [-1, 1] so that they are not classified as labelled, which need not succeed.

    `classify` gives logits (B, K), differentiable also at black and white. `start` is uniform in [-1, 1], the random
    start as a share of epsilon. What comes is as bytes would have it, within epsilon of `images` as bytes have them.
    """
    epsilon, step = settings.epsilon * 2 / 255, settings.step * 2 / 255
    # Gradients need tensors that were not made in inference mode, in which Lightning predicts.
    with torch.inference_mode(False), torch.enable_grad():
        originals, labels = from_uint8(to_uint8(images)).clone(), labels.clone()
        attacked = (originals + epsilon * start.clone()).clamp(-1, 1)
        for _ in range(settings.steps):
            attacked = attacked.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(classify(attacked), labels, reduction="sum"), attacked)
            change = (attacked.detach() + step * gradient.sign() - originals).clamp(-epsilon, epsilon)
            attacked = (originals + change).clamp(-1, 1)
        return from_uint8(to_uint8(attacked.detach()))


def say_layer(classifier: Backbone) -> None:
    """Log which layer is inverted, where it is a module by its name."""
    if classifier.layer != PENULTIMATE:
        shape = " x ".join(map(str, classifier.feature_shape))
        say(f"feature maps: {shape}, the output of '{classifier.layer}' in '{classifier.title}'")


class AdversarialExtraction(FeatureExtraction):
    """Turns images into adversarial ones against the backbone itself, then into feature shards.

    An image without a class, or of a class that is not among the backbone's, is attacked from the class that the
    backbone predicts. Each sample stores whether its attack succeeded, and the success rate is logged at the end.

    Args:
        attack: How far and in how many steps.
        kwargs: As for `FeatureExtraction`.
    """

    def __init__(self, attack: Attack = Attack(), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not self.backbone.classifies:
            raise UserError(
                f"`backbone`: '{self.backbone.name}' has no classes, so there is nothing to attack. Give a classifier."
            )
        self.attack = attack
        self._counts = torch.zeros(3, dtype=torch.long)  # of images: fooled, classified correctly before, without label

    def predict_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> Batch:
        images, labels = batch["images"], self._labels(batch)
        predicted = self.backbone(images)[1].argmax(1)
        classes = torch.where(labels >= 0, labels, predicted)
        start = torch.stack([torch.rand(images.shape[1:], generator=generator("attack", key)) for key in batch["key"]])
        attacked = attack(self.backbone.logits, images, classes, (2 * start - 1).to(images), self.attack)
        extracted = super().predict_step({**batch, "images": attacked}, batch_idx, dataloader_idx)
        fooled = (extracted["logits"].argmax(1) != classes).float().where(predicted == classes, torch.nan)
        readable = torch.tensor([not reason for reason in batch["unreadable"]]).to(fooled.device)
        outcomes = torch.stack([fooled == 1, fooled.isfinite(), labels < 0])
        self._counts += (outcomes & readable).sum(1).cpu()
        return {**extracted, "fooled": fooled}

    def teardown(self, stage: str) -> None:
        counts = self.trainer.strategy.reduce(self._counts.to(self.device), reduce_op="sum")
        fooled, right, guessed = (int(count) for count in counts)
        if self.trainer.is_global_zero and right:
            log.info(
                f"The attack succeeded on {fooled} of {right} images that were classified correctly "
                f"({fooled / right:.0%}), {self.attack.epsilon} grey levels away at most."
                + (f" Of {guessed} without a known label, the predicted class counts as correct." if guessed else "")
            )

    @property
    def provenance(self) -> Provenance:
        return {**super().provenance, "attack": str(self.attack)}
