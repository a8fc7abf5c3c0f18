"""The classifier whose features are inverted, frozen: of timm, torchvision, transformers, or one's own."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from featinv_pl.decoding import NoImageError, to_rgb
from featinv_pl.errors import UserError, reason
from featinv_pl.files import read_json
from featinv_pl.nets.classifier_files import Classes
from featinv_pl.nets.classifiers import of_python, of_timm, of_torchvision, of_transformers
from featinv_pl.nets.classifiers.maps import as_map, find_layer, output_of
from featinv_pl.nets.classifiers.network import CONFIG, Network
from featinv_pl.nets.classifiers.preparation import Transform
from featinv_pl.nets.frozen import Frozen
from featinv_pl.types import Observation, from_uint8, to_uint8

PENULTIMATE = "forward_features"


class Backbone(Frozen):
    """A frozen classifier that returns a feature map and its logits.

    Logits are those of the classifier itself, computed from the untouched output of its layers.

    Args:
        name: A name of timm (`resnet50.a1_in1k`, `hf-hub:org/name`), torchvision (`torchvision/resnet50`) or
            transformers (`hf/org/name`); the path of a class or function that makes a module (`package.module.Net`),
            which the environment must allow (`FEATINV_IMPORTS=package`); or a folder in the layout of timm, as
            `Classifier` writes it, or of transformers.
        weights: `pretrained` loads those that belong to the name, `random` none, which serves tests; else
            a file of weights for that architecture: `.safetensors`, or whatever torch has saved. Of torchvision also
            the name of other published weights (`IMAGENET1K_V1`).
        layer: The module whose output is the map, by its name in the model (`layer3`, `stages.2`, `blocks.5`).
            `forward_features` is the penultimate layer: of timm, the function of that name, whose output is what the
            classifier's head reads; else the module that returns the last spatial map before the logits.
        input_size: Side in pixels of the images that the classifier reads, if not that of its configuration.

    Attributes:
        feature_shape: (C, h, w) of the map at the input size, whatever the layout in the model.
        layer: The layer; of other libraries than timm always a module by its name.
        input_size: (H, W) that the classifier wants, in pixels.
        num_classes: Number of logits; 0 for a backbone whose output is an embedding, such as DINOv2 and CLIP's towers.
        classifies: Whether there are classes.
        classes: What they are called.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str | Network, weights: str = "pretrained", layer: str = PENULTIMATE, input_size: int | None = None
    ) -> None:
        super().__init__()
        self.network = network = _open(name, weights, input_size) if isinstance(name, str) else name
        self.name, self.title, self.weights = network.name, network.title, weights
        self.layer = network.layer or layer if layer == PENULTIMATE else layer
        self.model: Any = network.model
        self.classifies, prepared = network.classifies, network.preparation
        self.input_size, self.interpolation = prepared.input_size, prepared.interpolation
        device = next((one.device for one in self.model.parameters()), torch.device("cpu"))
        for statistic in ("mean", "std"):
            values = torch.tensor(getattr(prepared, statistic), dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(statistic, values.to(device), persistent=False)
        self.freeze()
        features, logits = self._first_run()
        channels, height, width = features.shape[1:]
        self.feature_shape = (channels, height, width)
        self.num_classes: int = logits.shape[1]
        self.classes = Classes.of(network.class_names, self.num_classes, network.names_from)

    @classmethod
    def of(cls, backbone: str | Self, weights: str, layer: str, input_size: int | None) -> Self:
        """A backbone that was made in Python, as it is; else that of a name, as the constructor makes it."""
        return cls(backbone, weights, layer, input_size) if isinstance(backbone, str) else backbone

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        layer: str = PENULTIMATE,
        transform: Transform | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Self:
        """The backbone that a module is, whose weights' digest is its identity.

        The module is frozen and put in evaluation mode and single precision, as it is and not as a copy.

        Args:
            model: Returns logits (B, K) of normalised images (B, 3, H, W), or an object with such `logits`.
            layer: As of the constructor.
            transform: With which the module was evaluated: makes normalised tensors (3, H, W) of PIL pictures, such as
                `weights.transforms()` of torchvision or a `Compose`. Or a dictionary with `input_size`, `mean` and
                `std`, as timm's `pretrained_cfg`. None if the module has such an attribute `transform`.
            class_names: In the order of the logits, as folders of images are called; None if they do not matter, and
                an empty list for a module whose output is an embedding.

        Raises:
            UserError: It is not a classifier of images with a spatial feature map, or the names do not fit its head.
        """
        return cls(of_python.open_module(model, transform, class_names), layer=layer)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images of any size.

        In single precision also within a run of mixed precision, since maps are compared with each other. On a GPU
        that is TF32 with 10 bits of mantissa: in convolutions by torch's default, and in other products where
        `torch.set_float32_matmul_precision` allows it, as the command and `FeatInvPipeline.to` do.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            The feature map (B, C, h, w) and the logits (B, K).
        """
        with torch.autocast(images.device.type, enabled=False):
            return self._observed(*self._run(self.transform(images.float())), len(images))

    def _observed(self, output: Any, logits: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        features = as_map(output, batch_size, self.model, self.input_size)
        if features is None:
            raise self._no_map()
        return features, logits if self.classifies else logits[:, :0]

    def logits(self, images: Tensor) -> Tensor:
        """The logits (B, K) alone, of images as `forward` takes them, with gradients."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network.logits(self.transform(images.float()))

    def _run(self, images: Tensor) -> tuple[Any, Tensor]:
        """The output of the layer, in whatever layout, and the logits."""
        if self.layer == PENULTIMATE:
            output = self.model.forward_features(images)
            return output, self.model.forward_head(output)
        return output_of(self.layer, self.model, self.network.logits, images)

    @torch.no_grad()
    def _first_run(self) -> tuple[Tensor, Tensor]:
        """Find the layer, and check what the classifier returns; its features and logits of one image."""
        layers = [name for name, _ in self.model.named_modules() if name]
        if self.layer not in (PENULTIMATE, *layers):
            close = difflib.get_close_matches(self.layer, layers, n=3) or self._ends_of_stages()
            raise UserError(
                f"`layer`: '{self.name}' has no layer '{self.layer}'. Did you mean {', '.join(close)}? "
                f"`{PENULTIMATE}` is the penultimate one."
            )
        height, width = self.input_size
        noise = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
        images = self.transform(noise.to(self.mean))
        try:
            if self.layer == PENULTIMATE and not self.network.has_head:
                layer, logits = find_layer(self.model, self.network.logits, images)
                self._check_logits(logits)
                if layer is None:
                    raise self._no_map()
                self.layer = layer
            output, logits = self._run(images[:1])
            self._check_logits(logits)
            return self._observed(output, logits, 1)
        except UserError:
            raise
        except Exception as error:  # it is anybody's code
            raise UserError(
                f"`backbone`: '{self.name}' cannot classify RGB images of {height} x {width} pixels "
                f"({type(error).__name__}: {reason(error)}). Give a classifier of images (B, 3, H, W), in the size "
                "that it was made for."
            ) from error

    def _check_logits(self, logits: Any) -> None:
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = f"a tensor {(*logits.shape,)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UserError(
                f"`backbone`: '{self.name}' returns {found} and not logits (B, classes). Give a classifier of images, "
                "which returns them as a tensor or as `logits` of its output."
            )

    def _no_map(self) -> UserError:
        named = "`backbone`: the penultimate layer" if self.layer == PENULTIMATE else f"`layer`: '{self.layer}'"
        return UserError(
            f"{named} of '{self.name}' does not return a spatial map, so there is nothing to invert. Choose a "
            "model or a `layer` that returns one map or one grid of tokens, such as the end of a stage."
        )

    def _ends_of_stages(self) -> list[str]:
        """Layers to suggest: timm's list, or the outermost modules."""
        stages = [info["module"] for info in getattr(self.model, "feature_info", ())]
        return stages or [name for name, _ in self.model.named_children()]

    def crop(self, image: Image.Image) -> Tensor:
        """A picture of any size and mode by the classifier's evaluation transform, before normalisation.

        Returns:
            (3, H, W) in [-1, 1].

        Raises:
            UserError: `to_rgb` refuses the picture.
        """
        try:
            return from_uint8(self.network.preparation.crop(to_rgb(image)))
        except NoImageError as error:
            raise UserError(f"the picture cannot be used ({error}). Leave it out or replace it.") from error

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder from which the classifier can be loaded, in its library's layout.

        Of a class path or a module from Python it holds the weights, and the code must be given again.
        """
        self.network.save(folder)

    def transform(self, images: Tensor) -> Tensor:
        """The classifier's own resize and normalisation; cropping belongs to the data side."""
        if images.shape[-2:] != self.input_size:
            images = transforms.resize(images, list(self.input_size), self.interpolation, antialias=True)
        # torch's clamp has no gradient at its bounds: black and white pixels could be neither attacked nor refined.
        images = images + (images.clamp(-1, 1) - images).detach()
        return ((images + 1) / 2 - self.mean) / self.std

    @torch.no_grad()
    def classify(self, images: Tensor) -> Observation:
        """Classify images as they would be stored: quantised to bytes."""
        images = from_uint8(to_uint8(images))
        features, logits = self(images)
        return {"images": images, "features": features, "logits": logits}

    @property
    def transform_name(self) -> str:
        """How images reach the classifier, for the manifest of a shard set."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        height, width = self.input_size
        return f"{self.interpolation.value} {height}x{width} mean {mean} std {std}"


def _open(name: str, weights: str, input_size: int | None) -> Network:
    """Open a classifier by the form of its name, and a folder by what its configuration says."""
    if name.startswith(of_torchvision.PREFIX):
        return of_torchvision.open_named(name, weights, input_size)
    if name.startswith(of_transformers.PREFIX):
        return of_transformers.open_named(name, weights, input_size)
    if Path(name).is_dir():
        config = read_json(Path(name) / CONFIG, "`backbone`", "Give the folder of a classifier, with its config.json.")
        if config.get("library") == of_torchvision.LIBRARY:
            return of_torchvision.open_folder(Path(name), input_size)
        if config.get("library") == of_python.LIBRARY:
            return of_python.open_folder(Path(name), input_size)
        if "model_type" in config:
            return of_transformers.open_named(name, weights, input_size)
    elif of_python.is_class_path(name) and not of_timm.is_name(name):
        return of_python.open_class_path(name, weights, input_size)
    return of_timm.open_named(name, weights, input_size)
