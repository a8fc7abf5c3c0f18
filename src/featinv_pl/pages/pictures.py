"""Pictures and predictions, as people read them."""

import io
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from featinv_pl.decoding import NoImageError, open_image
from featinv_pl.errors import UserError

HEAT = colormaps["magma"]
OPACITY = 0.6  # of a heat map at its hottest
_info = cache(ImageNetInfo)


def open_picture(path: Path, option: str = "IMAGE") -> Image.Image:
    """Decode a picture completely, so that a damaged one is refused before anything is computed."""
    try:
        return open_image(path)
    except NoImageError as error:
        advice = "Leave it out or replace it."
        raise UserError(f"{option}: '{path}' cannot be read as a picture ({error}). {advice}") from error


def png(shown: Image.Image | Figure) -> bytes:
    """A picture or a figure as PNG."""
    buffer = io.BytesIO()
    save = shown.savefig if isinstance(shown, Figure) else shown.save
    save(buffer, format="png")
    return buffer.getvalue()


def unique_names(names: Sequence[str]) -> list[str]:
    """Names for files or columns: with a number in front where several are the same."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{number}-{name}" for number, name in enumerate(names)]


def class_name(index: int, num_classes: int) -> str:
    """A class's number, and its name where the head is one of ImageNet's: 1k, 12k, 21k or 22k."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    words = _info(subset).index_to_description(index).split(",")[0] if subset else ""
    return f"{index} {words}".strip()


def prediction(logits: Tensor) -> str:
    """The class that logits (K,) make most likely; `none` of a network without classes."""
    return class_name(int(logits.argmax()), len(logits)) if len(logits) else "none"


def top_classes(logits: Tensor, count: int = 5) -> dict[str, float]:
    """The most likely classes of logits (K,) by name, with their probabilities, in descending order."""
    probabilities, indices = logits.float().softmax(0).topk(min(count, len(logits)))
    names = [class_name(index, len(logits)) for index in indices.tolist()]
    return dict(zip(names, (round(value, 4) for value in probabilities.tolist()), strict=True))


def listed_classes(logits: Tensor) -> str:
    """The most likely classes of logits (K,) with their probabilities, in a line."""
    return ", ".join(f"{name} ({share:.2f})" for name, share in top_classes(logits).items())


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Lay a heat map (h, w) in [0, 1] over a picture: the hotter, the more opaque."""
    grid = Image.fromarray((heat.clamp(0, 1) * 255).byte().cpu().numpy())
    level = np.asarray(grid.resize(picture.size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
    share = OPACITY * level[..., None]
    mixed = np.asarray(picture) * (1 - share) + HEAT(level)[..., :3] * 255 * share
    return Image.fromarray(mixed.round().astype(np.uint8))
