"""One entry of a shard: `prepare` and `encode` write it, `decode` reads it, `collate_samples` makes a batch of many."""

import io
import json
from functools import lru_cache
from math import isnan, nan
from tokenize import TokenError
from typing import Any, Literal, NotRequired, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.data import default_collate
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.types import Batch, from_uint8, to_uint8

ImageFormat = Literal["png", "jpg"]
Storage = Literal["float16", "int8"]

MAX_COSINE_LOSS = 1e-3  # of a map rounded to bytes, averaged over its locations
MOST_META = 1 << 16  # bytes of a sample's JSON; a path and a few numbers are some hundred
HALF_INFINITY = 0x7C00  # a half's exponent bits, all set in infinities and NaN alone
MEMBERS = {"features": "features.npy", "logits": "logits.npy", "moments": "latent.npy"}
STEPS = "steps.npy"
IMAGES = ("png", "jpg")
JPEG = {"format": "JPEG", "quality": 95}
PNG = {"format": "PNG", "compress_level": 1}  # Pillow's 6 takes three times as long, for 5 % less


class Sample(TypedDict):
    """One entry of a `Batch`, without the batch dimension."""

    images: NotRequired[Tensor]
    features: Tensor
    logits: Tensor
    moments: Tensor
    labels: int
    source: str
    key: str
    fooled: NotRequired[bool]


Stored = TypeVar("Stored", Sample, Batch)


def prepare(batch: Batch, storage: Storage = "float16", image_format: ImageFormat = "png") -> list[dict[str, Any]]:
    """Round a batch with images to what is stored of each sample: arrays by suffix, which `encode` turns into bytes.

    Features are stored as halves, or as `int8` with a step for each channel. `png` keeps every bit; `jpg` (quality 95)
    suits large photographs. The image comes last: training, which does not need it, reads the rest in one go.
    """
    tensors = {}
    for name, suffix in MEMBERS.items():
        values: Tensor = cast(Any, batch)[name]
        tensors[suffix] = values.to(torch.float16)
        finite = tensors[suffix].isfinite().flatten(1).all(dim=1).tolist()
        if wrong := [key for key, one in zip(batch["key"], finite, strict=True) if not one]:
            some = f"{len(wrong)} of {len(finite)} samples, such as '{wrong[0]}'"
            largest = values.abs().max().item()
            raise UserError(f"The {name} do not fit half precision: their largest magnitude is {largest:g}, in {some}.")
    if storage == "int8":
        quantised, steps = quantise(batch["features"].float())
        del tensors[MEMBERS["features"]]
        tensors = {MEMBERS["features"]: quantised, STEPS: steps, **tensors}
    tensors[image_format] = to_uint8(batch["images"]).permute(0, 2, 3, 1)
    arrays = {suffix: tensor.cpu().numpy() for suffix, tensor in tensors.items()}
    views, fooled = batch.get("view", [None] * len(batch["key"])), batch.get("fooled", batch["labels"] * nan).tolist()
    entries = []
    for n, (label, source, key) in enumerate(zip(batch["labels"].tolist(), batch["source"], batch["key"], strict=True)):
        meta: dict[str, Any] = {"label": label, "source": source, "key": key}
        if views[n] is not None:
            meta["view"] = views[n]
        if not isnan(fooled[n]):
            meta["fooled"] = bool(fooled[n])
        entries.append({"json": meta, **{suffix: values[n] for suffix, values in arrays.items()}})
    return entries


def encode(entry: dict[str, Any]) -> dict[str, bytes]:
    """Turn what `prepare` gives for a sample into the members of a tar, by suffix."""
    members = {}
    for suffix, value in entry.items():
        buffer = io.BytesIO()
        if suffix == "json":
            buffer.write(json.dumps(value).encode())
        elif suffix in IMAGES:
            options: dict[str, Any] = JPEG if suffix == "jpg" else PNG
            Image.fromarray(value).save(buffer, **options)
        else:
            np.save(buffer, value, allow_pickle=False)
        members[suffix] = buffer.getvalue()
    return members


def decode(members: dict[str, memoryview], storage: Storage = "float16", image_size: int | None = None) -> Sample:
    """Turn the members of a tar, by suffix, into a sample as it is stored, without its image if that has no size.

    Arrays come in half precision and images in bytes, without an operation of torch: threads of a forked process read
    too. Of a damaged entry this raises any of `reader.DAMAGE`.
    """
    meta = json.loads(bytes(members["json"][:MOST_META]))
    if not -1 <= int(meta["label"]) < 1 << 31:
        raise ValueError("a label that is not a class")
    dtypes = {"features": np.int8 if storage == "int8" else np.float16, "logits": np.float16, "moments": np.float16}
    tensors = {name: _decode_array(members[MEMBERS[name]], dtype) for name, dtype in dtypes.items()}
    if storage == "int8":
        steps = _decode_array(members[STEPS], np.float32).numpy()
        tensors["features"] = torch.from_numpy((tensors["features"].numpy() * steps[:, None, None]).astype(np.float16))
    sample: Any = {**tensors, "labels": int(meta["label"]), "source": str(meta["source"]), "key": str(meta["key"])}
    if "fooled" in meta:
        sample["fooled"] = meta["fooled"] is True
    if image_size is not None:
        image = Image.open(io.BytesIO(members["png"] if "png" in members else members["jpg"]), formats=("PNG", "JPEG"))
        if image.size != (image_size, image_size):  # before it is unpacked: a few bytes can claim any size
            raise ValueError(f"an image of {image.width} x {image.height} pixels instead of {image_size}")
        sample["images"] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return cast(Sample, sample)


def quantise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Round feature maps (B, C, h, w) to bytes, or raise UserError if that costs more than `MAX_COSINE_LOSS`.

    The bytes, in [-127, 127], times the step of each channel (B, C) are the map.
    """
    steps = (features.abs().amax(dim=(2, 3)) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    quantised = (features / steps[..., None, None]).round().clamp(-127, 127)
    somewhere = features.abs().amax(dim=1) > 0  # where all is zero there is no direction to lose
    loss = (1 - cosine_similarity(quantised * steps[..., None, None], features, dim=1)) * somewhere
    worst = (loss.sum(dim=(1, 2)) / somewhere.sum(dim=(1, 2)).clamp(min=1)).max().item()
    if worst > MAX_COSINE_LOSS:
        raise UserError(f"`storage`: int8 would change a feature map by {worst:.1e} in cosine. Store float16.")
    return quantised.to(torch.int8), steps


def collate_samples(samples: list[Sample]) -> Batch:
    """Stack samples to a batch, as they are stored."""
    listed: Any = {name: [cast(Any, sample)[name] for sample in samples] for name in samples[0] if name != "fooled"}
    # torch's own function stacks right into the memory that a worker shares with its parent.
    batch: Any = listed | {name: default_collate(listed[name]) for name in {*MEMBERS, "images"} & listed.keys()}
    batch["labels"] = torch.tensor(batch["labels"])
    if any("fooled" in sample for sample in samples):
        batch["fooled"] = torch.tensor([float(sample.get("fooled", nan)) for sample in samples])
    return cast(Batch, batch)


def widen(stored: Stored) -> Stored:
    """Bring a sample or a batch to single precision, which takes more bytes: best where it is computed with."""
    values: Any = stored
    values |= {name: values[name].float() for name in MEMBERS}
    if "images" in values:
        values["images"] = from_uint8(values["images"])
    return stored


def _decode_array(data: memoryview, dtype: type[np.generic]) -> Tensor:
    """Read an array in numpy's format, without a copy: `np.load` takes longer over its header than over the rest."""
    length = 10 + int.from_bytes(data[8:10], "little")
    found, shape = _decode_header(bytes(data[:length]))
    if found != np.dtype(dtype):
        raise ValueError(f"dtype {found} instead of {np.dtype(dtype)}")
    array: NDArray[Any] = np.frombuffer(data[length:], dtype).reshape(shape)
    # numpy's own check of halves takes ten times as long.
    finite = (array.view(np.uint16) & HALF_INFINITY) != HALF_INFINITY if dtype is np.float16 else np.isfinite(array)
    if not finite.all():
        raise ValueError("a value that is not finite")
    return torch.from_numpy(array)


@lru_cache(maxsize=64)
def _decode_header(header: bytes) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    """The dtype and shape of an array; all arrays of a kind in a set share one header."""
    file = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError) as error:  # of a deep one
        raise ValueError(f"an array that cannot be read ({error})") from error
    if fortran or dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError("an array that is pickled, in Fortran's order or of a negative size")
    return dtype, shape
