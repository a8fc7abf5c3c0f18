"""The classifier whose features are inverted: any timm model, frozen."""

import difflib
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from featinv_pl.errors import UserError
from featinv_pl.nets.frozen import Frozen
from featinv_pl.types import Views, from_uint8, to_uint8

MAX_PREFIX_TOKENS = 8  # class, distillation and register tokens; no timm model has more


class Backbone(Frozen):
    """A frozen timm classifier that returns its penultimate feature map and its logits.

    The penultimate layer is timm's `forward_features`, brought to (B, C, h, w) whatever its layout.
    Logits are those of the classifier itself, computed from the untouched output of that layer.

    Args:
        name: A timm model name (`resnet50.a1_in1k`), a hub name (`hf-hub:org/name`), or a folder
            in timm's layout (`config.json` and `model.safetensors`), as `Classifier` writes it.
        pretrained: Load weights. False gives random ones, which serves tests.

    Attributes:
        feature_shape: (C, h, w) of the map at the classifier's own input size.
        input_size: (H, W) that the classifier wants.
        num_classes: Number of logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool = True) -> None:
        super().__init__()
        self.name = name
        self.model: Any = _create(name, pretrained)
        config = resolve_model_data_config(self.model)
        self.input_size: tuple[int, int] = tuple(config["input_size"][1:])
        self.interpolation = InterpolationMode(config["interpolation"])
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)
        self.freeze()
        features, logits = self(torch.zeros(1, 3, *self.input_size))
        self.feature_shape: tuple[int, int, int] = tuple(features.shape[1:])
        self.num_classes: int = logits.shape[1]

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images of any size.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            The feature map (B, C, h, w) and the logits (B, K).
        """
        output = self.model.forward_features(self.transform(images))
        return _as_map(output, self.model, self.input_size, self.name), self.model.forward_head(output)

    def transform(self, images: Tensor) -> Tensor:
        """The classifier's own resize and normalisation; cropping belongs to the data side."""
        if images.shape[-2:] != self.input_size:
            images = transforms.resize(images, list(self.input_size), self.interpolation, antialias=True)
        return ((images.clamp(-1, 1) + 1) / 2 - self.mean) / self.std

    def look(self, images: Tensor) -> Views:
        """See images as they would be stored: quantised to bytes, then classified."""
        images = from_uint8(to_uint8(images))
        features, logits = self(images)
        return {"images": images, "features": features, "logits": logits}

    @property
    def transform_name(self) -> str:
        """How images reach the classifier, for the manifest of a shard set."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        height, width = self.input_size
        return f"{self.interpolation.value} {height}x{width} mean {mean} std {std}"


def _create(name: str, pretrained: bool) -> Any:
    """Build a timm model, with errors that say what to do."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"--model.backbone: the folder '{name}' holds no config.json, so it is not a classifier in "
                "timm's layout. Give the folder that fitting a Classifier has written."
            )
        try:
            return timm.create_model(f"local-dir:{name}", pretrained=pretrained)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"--model.backbone: the classifier in '{name}' could not be loaded ({_first_line(error)}). "
                "Its files are damaged or do not belong together: fit the Classifier anew."
            ) from error
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
        hint = f"Did you mean {', '.join(close)}? " if close else ""
        raise UserError(
            f"--model.backbone: '{name}' is neither a folder nor a timm model. {hint}"
            "`timm.list_models()` lists all names; a folder must have been written by fitting a Classifier."
        )
    try:
        return timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--model.backbone: the weights of '{name}' could not be loaded ({_first_line(error)}). "
            "Check the name and the network, or download the model to a folder and give that."
        ) from error


def _as_map(output: Any, model: Any, input_size: tuple[int, int], name: str) -> Tensor:
    """Bring the output of `forward_features` to (B, C, h, w).

    Args:
        output: (B, C, h, w), (B, h, w, C), or tokens (B, N, C) with or without prefix tokens.
        model: The timm model, asked for its layout.
        input_size: (H, W) of the input: a token grid has its aspect ratio.
        name: The model's name, for the error.
    """
    if isinstance(output, Tensor) and output.ndim == 4:
        return output.permute(0, 3, 1, 2) if getattr(model, "output_fmt", None) == "NHWC" else output
    if isinstance(output, Tensor) and output.ndim == 3:
        declared = getattr(model, "num_prefix_tokens", 0)
        for prefix in (declared, *range(MAX_PREFIX_TOKENS + 1)):
            tokens = output[:, prefix:]
            height = isqrt(tokens.shape[1] * input_size[0] // input_size[1])
            if height and height * (height * input_size[1] // input_size[0]) == tokens.shape[1]:
                grid: Tensor = tokens.unflatten(1, (height, -1))
                return grid.permute(0, 3, 1, 2)
    raise UserError(
        f"--model.backbone: the penultimate layer of '{name}' is not a spatial map, so there is nothing to "
        "invert. Choose a model whose `forward_features` returns one map or one grid of tokens."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
