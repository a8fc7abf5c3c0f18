"""What travels between the rooms: batches, observations, and the range of image values.

Shapes use B for the batch, C for feature channels, h and w for the feature map, K for classes.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, NotRequired

import torch
from torch import Tensor
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

Missing = Literal["skip", "refuse"]
"""What is done about sets that are not there."""


class Observation(TypedDict):
    """Images as a backbone sees them."""

    images: NotRequired[Tensor]
    """(B, 3, H, W) in [-1, 1]. Training on shards leaves them out: it needs only latents."""
    features: Tensor  # (B, C, h, w)
    logits: Tensor  # (B, K)


class View(TypedDict):
    """A random view of an image: all that is needed to make it again."""

    number: int  # among the views of its image
    crop: tuple[int, int, int, int]  # top, left, height and width in pixels of the original
    flips: str  # `h`, `v`, `hv`, or empty


class ImageBatch(TypedDict):
    """Images before any backbone has seen them."""

    images: Tensor
    """(B, 3, H, W) in [-1, 1]; loaders hand over bytes, which a data module maps to these on the device."""
    labels: Tensor
    """(B,) places of the classes among those of the data module; -1 where there is none."""
    class_name: list[str]
    """The classes by name, which say what a label means to a classifier; empty where there is none."""
    source: list[str]  # where each image comes from, such as `imagenet-a` or `corrupted/fog/3`
    key: list[str]  # a name for each image, unique within its source
    view: list[View | None]  # None for the central crop
    unreadable: list[str]
    """Why an image could not be read, in which case it is black; empty for those that could."""


class Batch(Observation):
    """A batch of feature shards."""

    moments: Tensor
    """(B, 2 * channels, H / f, W / f): mean and log-variance of the prior's autoencoder."""
    labels: Tensor
    source: list[str]
    key: list[str]
    view: NotRequired[list[View | None]]  # only while features are extracted, as is the next
    unreadable: NotRequired[list[str]]
    fooled: NotRequired[Tensor]
    """(B,), of adversarial images: 1 where the attack succeeded, 0 where it did not, NaN where the classifier was wrong
    before it."""
    noise: NotRequired[Tensor]
    """(2, B, channels, H / f, W / f): drawn by a loader, with `timesteps` and `chances` (B,); see `Draws`."""
    timesteps: NotRequired[Tensor]
    chances: NotRequired[Tensor]
    drawn: NotRequired[Sequence[int]]  # the seed, epoch and number of timesteps that these three depend on
    skipped: NotRequired[list[str]]
    """Why samples that belong here were left out: they are damaged."""


class Provenance(TypedDict):
    """The frozen parts that made a feature shard; they must match those of the model that reads it."""

    backbone: str
    backbone_digest: str
    layer: str
    feature_shape: list[int]
    num_classes: int
    transform: str
    autoencoder_digest: str
    image_size: int
    attack: str  # on the images before extraction; empty for none


def to_uint8(images: Tensor) -> Tensor:
    """Quantise images in [-1, 1] to bytes, rounding to nearest and clamping what lies outside."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Map bytes to [-1, 1]. Inverse of `to_uint8`."""
    return images.float() / 127.5 - 1


def predicted(logits: Tensor) -> Tensor:
    """The most likely class of logits (..., K); -1 where there are no classes."""
    return logits.argmax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -1, dtype=torch.long)


def key_hash(key: str) -> int:
    """A number of 48 bits, which float64 holds exactly, that looks random and depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")
