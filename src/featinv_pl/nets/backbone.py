"""The classifier whose features are inverted: any timm model, frozen."""

import difflib
from contextlib import suppress
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from featinv_pl.decoding import NoImageError, to_rgb
from featinv_pl.errors import UserError, reason
from featinv_pl.nets.classifier_files import Classes, misfit, read_classifier
from featinv_pl.nets.frozen import Frozen
from featinv_pl.nets.hub import read_config
from featinv_pl.types import Observation, from_uint8, to_uint8

MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens; no timm model has more
EMBEDDINGS = {384, 512, 640, 768, 1024, 1152, 1280}  # widths of those that CLIP's kind projects to
PENULTIMATE = "forward_features"


class Backbone(Frozen):
    """A frozen timm classifier that returns a feature map and its own logits.

    Args:
        name: A timm model name (`resnet50.a1_in1k`), a hub name (`hf-hub:org/name`), or a folder
            in timm's layout (`config.json` and `model.safetensors`), as `Classifier` writes it.
        weights: `pretrained` loads those that belong to the name, `random` none, which serves tests; else
            a file of weights for that architecture: `.safetensors`, or whatever torch has saved.
        layer: The module whose output is the map, by its name in the model (`layer3`, `stages.2`, `blocks.5`).
            `forward_features`, timm's function of that name, is the penultimate layer: what the head reads.
        input_size: Side of the images that the classifier sees, if not that of its configuration.

    Attributes:
        feature_shape: (C, h, w) of the map at the input size, whatever the layout in the model.
        input_size: (H, W) that the classifier wants.
        num_classes: Number of logits; 0 for a backbone whose output is an embedding, such as DINOv2 and CLIP's towers.
        classifies: Whether there are classes, whose names `classes` holds.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, weights: str = "pretrained", layer: str = PENULTIMATE, input_size: int | None = None
    ) -> None:
        super().__init__()
        self.name, self.weights, self.layer = name, weights, layer
        self.model: Any = _create(name, weights, input_size)
        if (channels := getattr(self.model, "in_chans", 3)) != 3:
            raise UserError(f"`backbone`: '{name}' takes images with {channels} channel(s). Give one for RGB images.")
        self.classifies = _classifies(self.model)
        try:
            self._prepare(_data_config(self.model, input_size))
        except (TypeError, ValueError, RuntimeError, LookupError) as error:
            raise UserError(
                f"`backbone`: '{name}' does not say how images are prepared for it ({error}). Give another model."
            ) from error
        self.freeze()
        if layer != PENULTIMATE:
            self._check_layer()
        with torch.no_grad():
            features, logits = self(torch.zeros(1, 3, *self.input_size))
        self.feature_shape: tuple[int, int, int] = tuple(features.shape[1:])
        self.num_classes: int = logits.shape[1]
        self.classes = Classes.of(self.model, self.num_classes)

    def _prepare(self, config: dict[str, Any]) -> None:
        self.input_size: tuple[int, int] = tuple(config["input_size"][1:])
        self.crop_pct = float(config["crop_pct"])
        self._crop = create_transform(**config, normalize=False)
        self.interpolation = InterpolationMode(config["interpolation"])
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The feature map (B, C, h, w) and logits (B, K) of images (B, 3, H, W) in [-1, 1], of any size."""
        # In full precision also within a run of mixed precision: maps are compared with each other.
        with torch.autocast(images.device.type, enabled=False):
            output, logits = self._run(self.transform(images.float()))
        features = _as_map(output, len(images), self.model, self.input_size)
        if features is None:
            named = "`backbone`: the penultimate layer" if self.layer == PENULTIMATE else f"`layer`: '{self.layer}'"
            raise UserError(
                f"{named} of '{self.name}' does not return a spatial map, so there is nothing to invert. Choose a "
                "model or a `layer` that returns one map or one grid of tokens, such as the end of a stage."
            )
        return features, logits if self.classifies else logits[:, :0]

    def logits(self, images: Tensor) -> Tensor:
        """The logits (B, K) alone, of images as `forward` takes them, with gradients."""
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.model(self.transform(images.float()))
            return logits

    def _run(self, images: Tensor) -> tuple[Any, Tensor]:
        if self.layer == PENULTIMATE:
            output = self.model.forward_features(images)
            return output, self.model.forward_head(output)
        outputs: list[Any] = []
        module = self.model.get_submodule(self.layer)
        with module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)):
            logits = self.model(images)
        return outputs[-1] if outputs else None, logits

    def _check_layer(self) -> None:
        layers = [module for module, _ in self.model.named_modules() if module]
        if self.layer not in layers:
            close = difflib.get_close_matches(self.layer, layers) or [one["module"] for one in self.model.feature_info]
            raise UserError(
                f"`layer`: '{self.name}' has no layer '{self.layer}'. Did you mean {', '.join(close)}? "
                f"`{PENULTIMATE}` is the penultimate one."
            )

    def crop(self, image: Image.Image) -> Tensor:
        """A picture of any size and mode by timm's evaluation transform, before normalisation: (3, H, W) in [-1, 1]."""
        try:
            return from_uint8(self._crop(to_rgb(image)))
        except NoImageError as error:
            raise UserError(f"the picture cannot be used ({error}). Leave it out or replace it.") from error

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` in timm's layout."""
        save_for_hf(self.model, str(folder), safe_serialization=True)

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
    def title(self) -> str:
        """The model's name, also where a folder was given."""
        return str(self.model.pretrained_cfg.get("architecture")) if Path(self.name).is_dir() else self.name

    @property
    def transform_name(self) -> str:
        """How images reach the classifier, for the manifest of a shard set."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        height, width = self.input_size
        return f"{self.interpolation.value} {height}x{width} mean {mean} std {std}"


def _create(name: str, weights: str, input_size: int | None) -> Any:
    source = name
    if Path(name).is_dir():
        source = f"local-dir:{name}"
        if weights == "pretrained":
            read_config(Path(name, "config.json"), "`backbone`", "Give a folder in timm's layout.")
    elif ":" not in name and not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
        hint = f"Did you mean {', '.join(close)}? " if close else ""
        raise UserError(
            f"`backbone`: '{name}' is neither a folder nor a timm model. {hint}`timm.list_models()` lists all names."
        )
    overlay: dict[str, Any] = {}
    if weights not in ("pretrained", "random"):  # timm converts older layouts, as of its own weights
        overlay = {"state_dict": read_classifier(Path(weights)), "custom_load": False, "source": None}
    options: dict[str, Any] = {"pretrained": weights != "random", "pretrained_cfg_overlay": overlay}
    try:
        model = timm.create_model(source, **options)
        if input_size and model.pretrained_cfg.get("fixed_input_size"):
            # Built again, so that timm fits tables of positions to the grid while it loads the weights.
            model = timm.create_model(source, **options, img_size=input_size)
        model.pretrained_cfg.pop("state_dict", None)
        return model
    except Exception as error:  # a hostile configuration can raise anything
        found = reason(error)
        if overlay:
            found += ". Give the file of that architecture, undamaged."
            with suppress(Exception):  # of a configuration that timm cannot build at all
                found = misfit(overlay["state_dict"], timm.create_model(source), name) or found
            raise UserError(f"`weights`: '{weights}' does not hold the weights of '{name}': {found}") from error
        if error.args == ("architecture",):
            found = "its config.json does not name an architecture of timm, as those of the library transformers do not"
        raise UserError(
            f"`backbone`: '{name}' could not be loaded ({found}). Check the name and the network, copy its folder "
            "again, or download the weights and give the file as `weights`."
        ) from error


def _data_config(model: Any, input_size: int | None) -> dict[str, Any]:
    """The data configuration of timm: that of testing, with its own crop, where the size asked for is that one."""
    if input_size is None:
        return dict(resolve_model_data_config(model))
    tested = resolve_model_data_config(model, use_test_size=True)
    config = tested if tested["input_size"][1:] == (input_size, input_size) else resolve_model_data_config(model)
    return {**config, "input_size": (3, input_size, input_size)}


def _classifies(model: Any) -> bool:
    """Whether a timm model has classes. The head of a tower of CLIP's kind is a projection, unless it was tuned."""
    config = model.pretrained_cfg
    name = f"{config.get('architecture')}.{config.get('tag')}"
    tower = ("clip" in name or "_pe_core_" in name) and "_ft_in" not in name
    return bool(model.num_classes) and not (tower and model.num_classes in EMBEDDINGS)


def _as_map(output: Any, batch_size: int, model: Any, input_size: tuple[int, int]) -> Tensor | None:
    """Bring the output of a layer, also (B, h, w, C) or tokens (B, N, C) after others, to (B, C, h, w); else None.

    A map has the aspect ratio of the input; where shapes leave its layout open, the timm model is asked.
    """
    if not isinstance(output, Tensor) or len(output) != batch_size:  # windows of a transformer are not a batch
        return None
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if _is_channels_last(output, model, input_size) else output
    if output.ndim == 3:
        declared = getattr(model, "num_prefix_tokens", 0)
        for prefix in (declared, *range(MAX_PREFIX_TOKENS + 1)):
            tokens = output[:, prefix:]
            height = isqrt(tokens.shape[1] * input_size[0] // input_size[1])
            if height and height * (height * input_size[1] // input_size[0]) == tokens.shape[1] > 1:
                grid: Tensor = tokens.unflatten(1, (height, -1))
                return grid.permute(0, 3, 1, 2)
    return None


def _is_channels_last(output: Tensor, model: Any, input_size: tuple[int, int]) -> bool:
    """Told by the aspect ratio, since layers within a model differ."""
    _, first, second, third = output.shape
    fits_last = first * input_size[1] == second * input_size[0]
    fits_first = second * input_size[1] == third * input_size[0]
    return fits_last if fits_last != fits_first else getattr(model, "output_fmt", None) == "NHWC"
