"""How pictures become the input of a classifier, told by its configuration or by any transform of pictures."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from featinv_pl.types import to_uint8

LARGEST_INPUT = 4096  # pixels of a side; the largest of a timm model is about a thousand
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # as PIL numbers them
OF_TENSORS = ("bilinear", "bicubic", "nearest")  # torch can interpolate tensors by no other
COLOURS = ((0, 0, 0), (255, 255, 255), (51, 102, 204))  # two tell a normalisation, the third whether it is all
PROBE_SIZES = ((320, 240), (280, 360))
Transform = Callable[[Image.Image], Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Preparation:
    """How pictures become the input of a classifier.

    Args:
        input_size: (H, W) of the images that it gets.
        mean: Of its normalisation, by channel, for values in [0, 1].
        std: Likewise.
        interpolation: By which images of another size are resized: `bilinear`, `bicubic` or `nearest`.
        crop: Makes bytes (3, H, W) of that size from a picture in RGB.

    Raises:
        ValueError: They cannot be.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: InterpolationMode
    crop: Callable[[Image.Image], Tensor]

    def __post_init__(self) -> None:
        if not all(1 <= side <= LARGEST_INPUT for side in self.input_size):
            raise ValueError(f"images of {self.input_size} pixels, and a side has 1 to {LARGEST_INPUT}")
        if not len(self.mean) == len(self.std) == 3 or not all(self.std):
            raise ValueError(f"mean {self.mean} and std {self.std}, and RGB images have three of each")

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self:
        """That of a resolved data configuration of timm."""
        return cls(
            tuple(config["input_size"][1:]),
            tuple(config["mean"]),
            tuple(config["std"]),
            InterpolationMode(config["interpolation"]),
            create_transform(**config, normalize=False),
        )

    @classmethod
    def of_transform(cls, transform: Transform, side: int | None = None) -> Self:
        """That of any evaluation transform, told by what it does to a few pictures.

        Args:
            transform: Makes normalised tensors (3, H, W) from pictures: of torchvision, timm, transformers, or one's
                own. Or a dictionary with keys of a `pretrained_cfg` of timm, of which `input_size` may be one number.
            side: Of the images, which only a dictionary can change.

        Raises:
            Exception: Of any kind; it may be anybody's code. ValueError: It is random, or does more than resize, crop
                and normalise.
        """
        if isinstance(transform, Mapping):
            if lacking := [name for name in ("input_size", "mean", "std") if name not in transform]:
                raise ValueError(f"it lacks {' and '.join(lacking)}")
            size = transform["input_size"] if side is None else side
            size = (3, size, size) if isinstance(size, int) else (3, *tuple(size)[-2:])
            return cls.of_config(resolve_data_config({}, {**transform, "input_size": size}))
        prepared = cls._probed(transform)
        if side is not None and prepared.input_size != (side, side):
            raise ValueError(f"it makes images of {prepared.input_size}, and `input_size` is {side}")
        return prepared

    @classmethod
    def _probed(cls, transform: Callable[[Image.Image], Any]) -> Self:
        noise = np.random.default_rng(0).integers(0, 256, (*PROBE_SIZES[0], 3), dtype=np.uint8)
        first, again, other = (
            _applied(transform, picture)
            for picture in (*[Image.fromarray(noise)] * 2, Image.new("RGB", PROBE_SIZES[1]))
        )
        if first.shape != other.shape:
            raise ValueError(f"the images that it makes have several sizes: {[*first.shape]} and {[*other.shape]}")
        if not torch.equal(first, again):
            raise ValueError("it is random")
        flat = [_applied(transform, Image.new("RGB", PROBE_SIZES[0], colour)).flatten(1) for colour in COLOURS]
        black, white, colour = (values.mean(1) for values in flat)
        std = 1 / (white - black)
        mean = -black * std
        uneven = max(float((values - values.mean(1, keepdim=True)).abs().max()) for values in flat)
        expected = (torch.tensor(COLOURS[2]) / 255 - mean) / std
        if not (uneven < 1e-3 and torch.allclose(expected, colour, atol=1e-3)):
            raise ValueError("it does more than resize, crop and normalise")
        for stated in _stated(transform):  # to the last digit, where the transform says so
            if torch.allclose(stated, torch.stack([mean, std]), atol=1e-5):
                mean, std = stated
                break
        means, stds = (tuple(round(value, 8) for value in part.tolist()) for part in (mean, std))
        height, width = first.shape[1:]
        return cls((height, width), means, stds, _interpolation(transform), Inverse(transform, means, stds))


@dataclass(frozen=True)
class Inverse:
    """The bytes (3, H, W) of a picture's crop, from a transform that normalises them."""

    transform: Callable[[Image.Image], Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return to_uint8(2 * (_applied(self.transform, picture).float() * std + mean) - 1)


def _applied(transform: Callable[[Image.Image], Any], picture: Image.Image) -> Tensor:
    image = transform(picture)
    if not isinstance(image, Tensor) or image.ndim != 3 or len(image) != 3:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"it makes {shape} and not a tensor (3, H, W)")
    return image.detach().double().cpu()


def _parts(transform: Any) -> Iterator[Any]:
    """A transform and those that it is composed of, or applies."""
    yield transform
    for part in (*getattr(transform, "transforms", ()), *getattr(transform, "args", ())):
        yield from _parts(part)


def _stated(transform: Any) -> Iterator[Tensor]:
    """(2, 3): mean and std as parts of a transform name them."""
    for part in _parts(transform):
        found = [getattr(part, name, getattr(part, f"image_{name}", None)) for name in ("mean", "std")]
        if all(isinstance(values, tuple | list | Tensor) and len(values) == 3 for values in found):
            yield torch.stack([torch.as_tensor(values, dtype=torch.double).flatten() for values in found])


def _interpolation(transform: Any) -> InterpolationMode:
    """That of the first part that has one, as far as torch has it; else bilinear."""
    for part in _parts(transform):
        found = getattr(part, "interpolation", getattr(part, "resample", None))
        name = INTERPOLATIONS[found] if isinstance(found, int) else getattr(found, "value", found)
        if name in INTERPOLATIONS:
            return InterpolationMode(name if name in OF_TENSORS else "bicubic")
    return InterpolationMode.BILINEAR
