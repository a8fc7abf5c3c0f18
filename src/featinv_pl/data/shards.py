"""Feature shards: WebDataset tars beside a manifest.

`encode` and `decode` are one entry's two directions. Tars are written by webdataset and stay readable
by it. They are read here by offset, because webdataset's stream stops without a word at a damaged
header and so loses samples, and because its order is neither exact nor repeatable across workers.
"""

import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_right
from functools import cached_property, lru_cache
from itertools import accumulate
from json import JSONDecodeError
from pathlib import Path
from tokenize import TokenError
from typing import Literal, NotRequired

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic
from webdataset import TarWriter

from featinv_pl.errors import UserError
from featinv_pl.types import Batch, Provenance, from_uint8, to_uint8

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
PARTIAL = ".partial"
ImageFormat = Literal["png", "jpg"]


class Shard(TypedDict):
    """What the manifest knows of one tar."""

    name: str
    samples: int
    bytes: int
    sha256: str


class Manifest(TypedDict):
    """A shard set: what made it, and what it holds."""

    format_version: int
    package_version: str
    source: str
    provenance: Provenance
    shards: list[Shard]


class Sample(TypedDict):
    """One entry of a `Batch`, without the batch dimension."""

    images: NotRequired[Tensor]
    features: Tensor
    logits: Tensor
    latents: Tensor
    labels: int
    source: str
    key: str


# One entry


def encode(batch: Batch, index: int, image_format: ImageFormat) -> dict[str, bytes]:
    """Turn one sample of a batch into the members of a tar.

    Args:
        batch: With images.
        index: Which sample.
        image_format: `png` keeps every bit; `jpg` (quality 95) suits large photographs.
    """
    return {
        image_format: _encode_image(batch["images"][index], image_format),
        "features.npy": _encode_array(batch["features"][index], "features"),
        "logits.npy": _encode_array(batch["logits"][index], "logits"),
        "latent.npy": _encode_array(batch["latents"][index], "latents"),
        "json": json.dumps(
            {"label": int(batch["labels"][index]), "source": batch["source"][index], "key": batch["key"][index]}
        ).encode(),
    }


def decode(members: dict[str, bytes], with_images: bool) -> Sample:
    """Turn the members of a tar into a sample. Inverse of `encode`, up to fp16.

    Args:
        members: Bytes by suffix, such as `features.npy`.
        with_images: Decode the picture, which training has no need of.

    Raises:
        ValueError, KeyError: The entry is damaged; `ShardSet` adds where.
    """
    meta = json.loads(members["json"])
    sample: Sample = {
        "features": _decode_array(members["features.npy"]),
        "logits": _decode_array(members["logits.npy"]),
        "latents": _decode_array(members["latent.npy"]),
        "labels": int(meta["label"]),
        "source": str(meta["source"]),
        "key": str(meta["key"]),
    }
    if with_images:
        pixels = np.array(Image.open(io.BytesIO(members["png"] if "png" in members else members["jpg"])).convert("RGB"))
        sample["images"] = from_uint8(torch.from_numpy(pixels).permute(2, 0, 1))
    return sample


def _encode_image(image: Tensor, image_format: ImageFormat) -> bytes:
    buffer = io.BytesIO()
    pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    options = {"quality": 95} if image_format == "jpg" else {}
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "png": "PNG"}[image_format], **options)
    return buffer.getvalue()


def _encode_array(tensor: Tensor, name: str) -> bytes:
    half = tensor.to(torch.float16)
    if not half.isfinite().all():
        largest = tensor.abs().max().item()
        raise UserError(f"The {name} do not fit half precision: their largest magnitude is {largest:g}.")
    buffer = io.BytesIO()
    np.save(buffer, half.cpu().numpy(), allow_pickle=False)
    return buffer.getvalue()


def _decode_array(data: bytes) -> Tensor:
    try:
        array: NDArray[np.float16] = np.load(io.BytesIO(data), allow_pickle=False)
    except (EOFError, SyntaxError, TokenError) as error:  # what numpy raises over a damaged header
        raise ValueError(f"an array that cannot be read ({type(error).__name__})") from error
    if array.dtype != np.float16:
        raise ValueError(f"dtype {array.dtype} instead of float16")
    tensor = torch.from_numpy(array).float()
    if not tensor.isfinite().all():
        raise ValueError("a value that is not finite")
    return tensor


# A set of shards


class ShardSetWriter:
    """Writes one process's shards of a set. Nothing has its final name before it is whole.

    Args:
        folder: Where to.
        source: Name of the source.
        rank: This process's rank, which its shards' names carry.
        shard_size: Samples per shard.
        image_format: See `encode`.

    Attributes:
        shards: The finished ones.
    """

    def __init__(
        self, folder: Path, source: str, rank: int = 0, shard_size: int = 1000, image_format: ImageFormat = "png"
    ) -> None:
        self.folder, self.source, self.rank = folder, source, rank
        self.shard_size, self.image_format = shard_size, image_format
        self.shards: list[Shard] = []
        self._tar: TarWriter | None = None
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, batch: Batch, index: int) -> None:
        """Append one sample of a batch."""
        members = encode(batch, index, self.image_format)
        if self._tar is None:
            # A fixed time makes equal content equal bytes.
            self._tar = TarWriter(str(self._partial), encoder=False, mtime=0, user="featinv", group="featinv")
        key = f"{self.rank:04d}-{len(self.shards) * self.shard_size + self._count:09d}"
        self._tar.write({"__key__": key, **members})
        self._count += 1
        if self._count == self.shard_size:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Close the shard in progress, if any, and give it its name."""
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        final = self._partial.with_suffix("")
        data = self._partial.read_bytes()
        os.replace(self._partial, final)
        sha256 = hashlib.sha256(data).hexdigest()
        self.shards.append({"name": final.name, "samples": self._count, "bytes": len(data), "sha256": sha256})
        self._count = 0

    def close(self) -> None:
        """Let go of an unfinished shard, which keeps its partial name."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    @property
    def _partial(self) -> Path:
        name = self.source.replace("/", "-")
        return self.folder / f"{name}-{self.rank:04d}-{len(self.shards):05d}.tar{PARTIAL}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, last of all: its presence says that the set is whole."""
    partial = folder / (MANIFEST + PARTIAL)
    partial.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(partial, folder / MANIFEST)


def read_manifest(folder: Path, option: str) -> Manifest:
    """Read a manifest and check that every shard it names is there, whole by its size.

    Args:
        folder: The shard set.
        option: The option that named the folder, for errors.
    """
    if not folder.is_dir():
        raise UserError(f"{option}: there is no folder '{folder}'. Check the path, or extract features first.")
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{option}: '{folder}' has no {MANIFEST}, so it is no finished shard set. "
            "Run the extraction (featinv-pl predict) to its end."
        )
    try:
        contents = json.loads((folder / MANIFEST).read_text())
        version = contents.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:  # checked first: another version may have other fields
            raise UserError(
                f"{option}: '{folder}' has shard format {version}, and this version reads {FORMAT_VERSION}. "
                "Extract the features anew."
            )
        manifest = TypeAdapter(Manifest).validate_python(contents)
    except (JSONDecodeError, UnicodeDecodeError, AttributeError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{option}: '{folder / MANIFEST}' is damaged ({reason}). Extract the features anew.") from error
    for shard in manifest["shards"]:
        path, expected = folder / shard["name"], shard["bytes"]
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"{option}: the shard '{path}' {found}; its manifest says {expected} bytes. "
                "Copy it again, or extract the features anew."
            )
    return manifest


def find_sets(name: str, folder: Path, option: str) -> dict[str, Path]:
    """Shard sets at or below a folder, by name of source.

    A folder of sets, such as that of a benchmark with many corruptions, gives `name/<path below>`.
    """
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return {name: folder}
    below = sorted(path.parent for path in folder.rglob(MANIFEST))
    return {f"{name}/{path.relative_to(folder).as_posix()}": path for path in below} or {name: folder}


class ShardSet(Dataset[Sample]):
    """A shard set, by index.

    Args:
        folder: Holds the manifest and the tars.
        source: Name of the source in batches and scores.
        option: The option that named the folder, for errors.
        with_images: Decode the pictures.
    """

    def __init__(self, folder: Path, source: str, option: str, with_images: bool = True) -> None:
        self.folder, self.source, self.with_images = folder, source, with_images
        self.manifest = read_manifest(folder, option)
        self.shard_sizes = [shard["samples"] for shard in self.manifest["shards"]]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.shard_sizes))

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        shard = self.manifest["shards"][number]
        within = index - (self._ends[number] - shard["samples"])
        path = self.folder / shard["name"]
        entries = _tar_index(path, path.stat().st_mtime_ns)
        if len(entries) != shard["samples"]:
            raise UserError(
                f"The shard '{path}' is damaged: {len(entries)} samples can be read, and its manifest says "
                f"{shard['samples']}. Extract the features anew."
            )
        key, members = entries[within]
        try:
            with path.open("rb") as file:
                sample = decode({name: _read(file, *span) for name, span in members.items()}, self.with_images)
            self._check(sample)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no member {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"The sample '{key}' of the shard '{path}' is damaged: {reason}. Extract the features anew."
            ) from error
        sample["source"] = self.source
        return sample

    def _check(self, sample: Sample) -> None:
        made_by = self.manifest["provenance"]
        for name, tensor, shape in (
            ("a map", sample["features"], tuple(made_by["feature_shape"])),
            ("logits", sample["logits"], (made_by["num_classes"],)),
        ):
            if tensor.shape != shape:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} instead of {shape}")


Span = tuple[int, int]
"""Offset and size of a member in its tar."""


@lru_cache(maxsize=4096)
def _tar_index(path: Path, modified: int) -> list[tuple[str, dict[str, Span]]]:
    """Where each entry's members lie: (key, {suffix: span}) in the order of the tar.

    Args:
        path: The tar.
        modified: When it was last modified, so that a tar that has been replaced is read anew.
    """
    entries: dict[str, dict[str, Span]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                entries.setdefault(key, {})[suffix] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"The shard '{path}' is damaged: {error}. Extract the features anew.") from error
    return list(entries.items())


def _read(file: io.BufferedReader, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def collate_samples(samples: list[Sample]) -> Batch:
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
