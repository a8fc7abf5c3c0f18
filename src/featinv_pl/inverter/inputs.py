"""What a pipeline is given, whatever form it has: pictures as RGB, feature maps as a batch."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from featinv_pl.decoding import NoImageError, open_image, to_rgb
from featinv_pl.errors import UserError, reason, renamed
from featinv_pl.sampling.sampler import Sampler

Picture = str | Path | Image.Image | NDArray[Any] | Tensor
"""A path; a PIL image of any mode; an array (H, W) or (H, W, C) or a tensor (C, H, W), of bytes or floats in [0, 1]."""

CHANNELS = (1, 3, 4)  # grey, RGB and RGBA
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OVERSHOOT = 1e-3  # of resampled floats; it is cut off
ADVICE = "Leave it out or replace it."
KINDS = "Give a path, a PIL image, an array (H, W, 3), a tensor (3, H, W), or a list of these."


def as_pictures(pictures: Picture | Sequence[Picture]) -> list[Image.Image]:
    """One picture, several in a list, or a batch of arrays (B, H, W, C) or tensors (B, C, H, W), as RGB of any size.

    Raises:
        UserError: There is none, or one cannot be read.
    """
    if isinstance(pictures, Tensor | np.ndarray):
        pictures = list(pictures) if pictures.ndim == 4 else [pictures]
    elif isinstance(pictures, str | os.PathLike | Image.Image):
        pictures = [pictures]
    elif not isinstance(pictures, Sequence) or isinstance(pictures, bytes):
        raise UserError(f"`pictures`: cannot read a picture from {type(pictures).__name__}. {KINDS}")
    if not len(pictures):
        raise UserError("`pictures`: there are none. Give at least one.")
    return [_as_picture(one, f"`pictures`: number {number}") for number, one in enumerate(pictures)]


def as_maps(features: Any, shape: tuple[int, int, int]) -> Tensor:
    """One feature map (C, h, w) or several (B, C, h, w), in any float precision, as (B, C, h, w) in single precision.

    Raises:
        UserError: They are not of `shape`, not floats or not finite.
    """
    maps = torch.as_tensor(features).detach()
    expected = "x".join(map(str, shape))
    if maps.ndim not in (3, 4) or maps.shape[-3:] != shape or not len(maps):
        raise UserError(
            f"`features`: the shape is {tuple(maps.shape)}, and this inverter reads maps of {tuple(shape)}. "
            f"Give one map of {expected}, or several with a batch axis in front."
        )
    if not maps.is_floating_point():
        raise UserError(f"`features`: the values are {maps.dtype}. Give floats, as `classify` returns them.")
    if not (maps := maps.float()).isfinite().all():
        raise UserError("`features`: some values are NaN or infinite. Give a map without them.")
    return maps if maps.ndim == 4 else maps[None]


def is_map(given: Any) -> bool:
    """Whether a tensor is a feature map rather than a picture, by its number of channels."""
    return isinstance(given, Tensor) and given.ndim in (3, 4) and given.shape[-3] not in CHANNELS


def whole(name: str, value: Any, least: int = 1) -> int:
    """Check that an argument is an integer of at least `least`."""
    try:
        number = index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise UserError(f"`{name}` cannot be {value!r}. Give a whole number of at least {least}.")
    return number


def as_noise(
    seed: int | None, generator: Generator | Sequence[Generator] | None, num_samples: int, total: int
) -> tuple[int, list[str]]:
    """The seed and keys of the noise of all samples: by their numbers, or one generator's draw for each."""
    keys = [str(number % num_samples) for number in range(total)]
    if generator is None:
        return whole("seed", 0 if seed is None else seed, least=0), keys
    if seed is not None:
        raise UserError("`seed` and `generator` cannot be given together. Leave one out.")
    if isinstance(generator, Generator):
        return _drawn(generator), keys
    if not isinstance(generator, Sequence) or not all(isinstance(one, Generator) for one in generator):
        raise UserError(
            f"`generator` cannot be {type(generator).__name__}. Give a torch.Generator, or a list of these."
        )
    if len(generator) != total:
        raise UserError(f"`generator`: there are {len(generator)} for {total} reconstructions. Give one for each.")
    return 0, [str(_drawn(one)) for one in generator]


def as_sampler(sampler: Sampler, steps: int | None, guidance_scale: float | None) -> Sampler:
    """The sampler of one call."""
    if steps is not None:
        sampler = replace(sampler, steps=whole("num_inference_steps", steps))
    if guidance_scale is not None:
        if not isinstance(guidance_scale, int | float):
            raise UserError(f"`guidance_scale` cannot be {guidance_scale!r}. Give a number; 1 disables guidance.")
        with renamed("sampler.guidance_scale", "guidance_scale"):
            sampler = replace(sampler, guidance_scale=float(guidance_scale))
    return sampler


def as_place(now: torch.device, *args: Any, **kwargs: Any) -> tuple[torch.device, torch.dtype | None]:
    """The device and, if one is given, the dtype that torch's `to` would move something on `now` to."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    mark = torch.empty(0, dtype=torch.bool, device=now)  # a dtype that weights never have
    try:
        asked = mark.to(*args, **given) if args or given else mark
    except (RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"`device` or `dtype` cannot be used ({reason(error)}). Give those of torch.") from error
    if asked.dtype not in (torch.bool, *DTYPES):
        raise UserError(f"`dtype` cannot be {asked.dtype}. Give one of {', '.join(map(str, DTYPES))}.")
    if asked.device.type == "meta":
        raise UserError("`device` cannot be meta, which holds no weights.")
    return asked.device, None if asked.dtype == torch.bool else asked.dtype


def _as_picture(picture: Picture, what: str) -> Image.Image:
    if isinstance(picture, str) and re.match(r"[A-Za-z][\w+.-]+://", picture):
        raise UserError(f"{what} is the address '{picture}', and nothing is downloaded. Give the path of a file.")
    try:
        if isinstance(picture, str | os.PathLike):
            what = f"`pictures`: '{os.fspath(picture)}'"
            return open_image(Path(picture))
        if isinstance(picture, Tensor):
            if picture.ndim != 3 or picture.shape[0] not in CHANNELS:
                raise NoImageError(f"a tensor of shape {tuple(picture.shape)} is not (C, H, W) with C 1, 3 or 4")
            values = picture.detach().cpu()
            values = values.float() if values.is_floating_point() else values
            picture = values.permute(1, 2, 0).numpy()
        if isinstance(picture, np.ndarray):
            return _from_array(picture)
        if isinstance(picture, Image.Image):
            return to_rgb(picture)
    except NoImageError as error:
        raise UserError(f"{what} cannot be read as a picture ({error}). {ADVICE}") from error
    except (OSError, ValueError, SyntaxError) as error:  # of a damaged file, which Pillow decodes only now
        raise UserError(f"{what} is damaged ({error}). {ADVICE}") from error
    raise UserError(f"{what} is of the type {type(picture).__name__}. {KINDS}")


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in CHANNELS or not array.size:
        turned = " Arrays have their channels last: use array.transpose(1, 2, 0)." if array.shape[0] in CHANNELS else ""
        raise NoImageError(f"an array of shape {array.shape} is not (H, W) or (H, W, C) with C 1, 3 or 4.{turned}")
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # false for NaN, too
            raise NoImageError(f"its floats reach from {low:.3g} to {high:.3g}, and pictures of floats from 0 to 1")
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise NoImageError(f"its values are {array.dtype}, and pictures are uint8 from 0 to 255 or floats from 0 to 1")
    return to_rgb(Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)))


def _drawn(generator: Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
