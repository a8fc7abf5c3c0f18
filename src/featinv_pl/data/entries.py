"""One entry of a shard: `encode` and `decode` are its two directions, `collate` makes a batch of many."""

import io
import json
from functools import lru_cache
from tokenize import TokenError
from typing import Literal, NotRequired

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.types import Batch, from_uint8, to_uint8

ImageFormat = Literal["png", "jpg"]
Storage = Literal["float16", "int8"]

MAX_COSINE_LOSS = 1e-3  # of a map rounded to bytes, averaged over its locations
HALF_INFINITY = 0x7C00  # a half's exponent bits, all set in infinities and NaN alone


class Sample(TypedDict):
    """One entry of a `Batch`, without the batch dimension."""

    images: NotRequired[Tensor]
    features: Tensor
    logits: Tensor
    latents: Tensor
    labels: int
    source: str
    key: str


def encode(batch: Batch, index: int, image_format: ImageFormat, storage: Storage = "float16") -> dict[str, bytes]:
    """Turn one sample of a batch into the members of a tar.

    The image comes last, so that training, which has no need of it, reads what precedes it in one go.

    Args:
        batch: With images, on the CPU.
        index: Which sample.
        image_format: `png` keeps every bit; `jpg` (quality 95) suits large photographs.
        storage: Of the feature map. `int8` keeps a byte for each value and a step for each channel.
    """
    meta = {"label": int(batch["labels"][index]), "source": batch["source"][index], "key": batch["key"][index]}
    if "view" in batch and (view := batch["view"][index]) is not None:
        meta["view"] = view
    features = batch["features"][index]
    members = {"json": json.dumps(meta).encode()}
    if storage == "int8":
        _half(features, "features")  # what does not fit there is no feature map to round either
        quantised, steps = quantise(features)
        members |= {"features.npy": _encode_array(quantised), "steps.npy": _encode_array(steps)}
    else:
        members["features.npy"] = _encode_array(_half(features, "features"))
    return members | {
        "logits.npy": _encode_array(_half(batch["logits"][index], "logits")),
        "latent.npy": _encode_array(_half(batch["latents"][index], "latents")),
        image_format: _encode_image(batch["images"][index], image_format),
    }


def decode(members: dict[str, memoryview], storage: Storage = "float16", with_images: bool = True) -> Sample:
    """Turn the members of a tar into a sample. Inverse of `encode`, up to the storage's precision.

    Args:
        members: Bytes by suffix, such as `features.npy`.
        storage: As given to `encode`.
        with_images: Decode the picture, which training has no need of.

    Raises:
        ValueError, KeyError: The entry is damaged; `ShardSet` adds where.
    """
    meta = json.loads(bytes(members["json"]))
    if storage == "int8":
        steps = torch.from_numpy(_decode_array(members["steps.npy"], np.float32))
        features = torch.from_numpy(_decode_array(members["features.npy"], np.int8)) * steps[:, None, None]
    else:
        features = torch.from_numpy(_decode_array(members["features.npy"], np.float16)).float()
    sample: Sample = {
        "features": features,
        "logits": torch.from_numpy(_decode_array(members["logits.npy"], np.float16)).float(),
        "latents": torch.from_numpy(_decode_array(members["latent.npy"], np.float16)).float(),
        "labels": int(meta["label"]),
        "source": str(meta["source"]),
        "key": str(meta["key"]),
    }
    if with_images:
        image = Image.open(io.BytesIO(members["png"] if "png" in members else members["jpg"]), formats=("PNG", "JPEG"))
        sample["images"] = from_uint8(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    return sample


def quantise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Round a feature map to bytes.

    Args:
        features: (C, h, w).

    Returns:
        Bytes (C, h, w) in [-127, 127], and the step of each channel (C,), whose product is the map.
        Channels have steps of their own, since some are far larger than others.

    Raises:
        UserError: Rounding would cost more than `MAX_COSINE_LOSS`.
    """
    features = features.float()
    steps = (features.abs().amax(dim=(1, 2)) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    quantised = (features / steps[:, None, None]).round().clamp(-127, 127)
    cosine = cosine_similarity(quantised * steps[:, None, None], features, dim=0)
    loss = 1 - cosine[features.abs().amax(dim=0) > 0].mean().item()  # where all is zero there is no direction
    if loss > MAX_COSINE_LOSS:
        raise UserError(
            f"--trainer.callbacks.storage: int8 would change a feature map by {loss:.1e} in cosine, and at most "
            f"{MAX_COSINE_LOSS:g} is allowed. Store float16."
        )
    return quantised.to(torch.int8), steps


def _encode_image(image: Tensor, image_format: ImageFormat) -> bytes:
    buffer = io.BytesIO()
    pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    options = {"quality": 95} if image_format == "jpg" else {}
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "png": "PNG"}[image_format], **options)
    return buffer.getvalue()


def _half(tensor: Tensor, name: str) -> Tensor:
    half = tensor.to(torch.float16)
    if not half.isfinite().all():
        largest = tensor.abs().max().item()
        raise UserError(f"The {name} do not fit half precision: their largest magnitude is {largest:g}.")
    return half


def _encode_array(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.cpu().numpy(), allow_pickle=False)
    return buffer.getvalue()


def _decode_array(data: memoryview, dtype: type[np.generic]) -> NDArray[np.generic]:
    """Read an array in numpy's format, without a copy: `np.load` takes longer over its header than over the rest."""
    length = 10 + int.from_bytes(data[8:10], "little")
    found, shape = _decode_header(bytes(data[:length]))
    if found != np.dtype(dtype):
        raise ValueError(f"dtype {found} instead of {np.dtype(dtype)}")
    array: NDArray[np.generic] = np.frombuffer(data[length:], dtype).reshape(shape)
    if dtype is np.float16:
        bits = array.view(np.uint16) & HALF_INFINITY
        if (bits == HALF_INFINITY).any():
            raise ValueError("a value that is not finite")
    return array


@lru_cache(maxsize=64)
def _decode_header(header: bytes) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    """The dtype and shape of an array; all arrays of a kind in a set share one header."""
    file = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError, SyntaxError, TokenError) as error:
        raise ValueError(f"an array that cannot be read ({error})") from error
    if fortran or dtype.hasobject:
        raise ValueError("an array that is pickled or in Fortran's order")
    return dtype, shape


def collate(samples: list[Sample]) -> Batch:
    """Stack samples to a batch."""
    batch: Batch = {
        "features": torch.stack([sample["features"] for sample in samples]),
        "logits": torch.stack([sample["logits"] for sample in samples]),
        "latents": torch.stack([sample["latents"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
        "source": [sample["source"] for sample in samples],
        "key": [sample["key"] for sample in samples],
    }
    if "images" in samples[0]:
        batch["images"] = torch.stack([sample["images"] for sample in samples])
    return batch
