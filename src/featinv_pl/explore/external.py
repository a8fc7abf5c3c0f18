"""Directions that other tools have found: vectors, components of an NMF, sparse autoencoders, from files of arrays.

A file is safetensors, or NumPy's npy or npz, which are read without pickles. `docs/viz.md` says how it is laid out.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.explore.concepts import ADDITIVE, BATCH, UNIT_QUANTILE, Concepts, Method, nmf_of
from featinv_pl.explore.exploration import Origin, Samples

SUFFIXES = (".safetensors", ".npz", ".npy")
LARGEST = 2**31  # bytes of an array
DECODER, ENCODER, BIASES = "W_dec", "W_enc", ("b_enc", "b_dec")  # of a sparse autoencoder, as SAELens calls them
THRESHOLD = "threshold"  # of one whose activation is not a ReLU
ONLY_ARRAY = "array"  # the key of what a npy holds
CHECKED = ("backbone_digest", "layer")
NOTE = "The file of the directions does not say of which classifier and layer they are: only channels were compared."


@dataclass(frozen=True)
class Directions:
    """Arrays of a file, not yet of a classifier."""

    path: Path
    method: Method
    vectors: Tensor  # (C), (K, C), (C, K), (C, h, w) or (K, C, h, w)
    encoder: Mapping[str, Tensor]  # of a sparse autoencoder, by name; else empty
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path, key: str | None, method: Method | None = None) -> Self:
        """Read an array of a file; `key` may be None if there is one only. A `method` replaces what the file says.

        Raises:
            UserError: The file is damaged or of another kind, or has no such array of numbers.
        """
        arrays, metadata = _tensors(path, key)
        vectors = arrays.pop(key or next(iter(arrays)))
        said = metadata.get("method", "sae" if key == DECODER and ENCODER in arrays else "cav")
        method = method or next((one for one in get_args(Method) if one == said), None)
        if method is None:
            raise UserError(
                f"`key`: '{path}' says that its directions are of method '{said[:50]}'. "
                f"Known are {', '.join(get_args(Method))}."
            )
        encoder = {}
        if method == "sae":
            encoder = {name: arrays[name] for name in (ENCODER, *BIASES) if name in arrays}
            if ENCODER not in encoder or THRESHOLD in arrays:
                raise UserError(
                    f"`key`: a sparse autoencoder is read by its decoder {DECODER} and encoder {ENCODER}, whose "
                    f"activation is a ReLU, and '{path}' has {', '.join(sorted([key or '', *arrays]))}. "
                    "Give such a file, or `method` cav, which needs the directions alone."
                )
        for name, one in {"the array": vectors, **encoder}.items():
            if not (one.is_floating_point() and one.isfinite().all()):
                raise UserError(f"`key`: {name} of '{path}' is not of finite floating-point numbers. Give another.")
        return cls(path, method, vectors.float(), {name: one.float() for name, one in encoder.items()}, metadata)

    def concepts(self, origin: Origin) -> Concepts:
        """The directions as concepts of maps of a classifier, of the lengths that they have in the file.

        Raises:
            UserError: Their shape does not fit the maps, or they belong to another classifier or layer.
        """
        for name in CHECKED:
            ours, theirs = str(origin[name]), self.metadata.get(name)  # type: ignore[literal-required]
            if theirs is not None and theirs != ours:
                raise UserError(
                    f"`concepts`: '{self.path}' is of {name} '{theirs[:80]}', and the maps here are of '{ours}'. "
                    "Give directions that were found with this classifier and layer."
                )
        directions = _as_maps(self.vectors, origin["feature_shape"], self.method in ADDITIVE)
        if directions is None or not directions.flatten(1).any(1).all():
            what = "has a direction that is zero" if directions is not None else "does not fit"
            raise UserError(
                f"`key`: an array of shape {list(self.vectors.shape)} in '{self.path}' {what}; maps here are of "
                f"{origin['feature_shape']}. Give concepts in rows (K, C), one vector (C), or whole maps (K, C, h, w)."
            )
        names = self._names(len(directions))
        encoder = self._encoder(*directions.shape[:2]) if self.encoder else None
        note = "" if {*CHECKED} <= self.metadata.keys() else NOTE
        return Concepts(self.method, names, directions, torch.zeros_like(directions), {}, origin, encoder, note)

    def measured(self, samples: Samples) -> Concepts:
        """The directions as concepts in units of how strongly real images express them.

        Strength 1 is, for an NMF, as where the command finds it; for a sparse autoencoder, the activation that one in
        a hundred of those above 0 exceeds; for other vectors, a standard deviation over images, and 0 their mean.
        """
        found = self.concepts(samples.origin)
        number, height, width = len(found.names), *samples.features.shape[-2:]
        if 4 * number * height * width * len(samples.features) > LARGEST:
            raise UserError(
                f"`num_images`: activations of {number} directions at {height}x{width} locations of "
                f"{len(samples.features)} images do not fit in memory. Give fewer images, or fewer directions."
            )
        if self.method == "nmf":
            return nmf_of(found.directions, samples, found.names)
        batches = [maps.float() for maps in samples.features.split(BATCH)]
        activations = torch.cat([found.activations(maps) for maps in batches])
        if found.encoder is not None:
            active = [one[one > 0].numpy() for one in activations.unbind(1)]
            units = torch.tensor([np.quantile(one, UNIT_QUANTILE) if one.size else 1.0 for one in active]).float()
            scaled = found.directions * units.view(-1, 1, 1, 1)
            return replace(found, directions=scaled, encoder=found.encoder / units[:, None], note="")
        scores = activations.mean((2, 3))
        means, spreads = (one.view(-1, 1, 1, 1) for one in (scores.mean(0), scores.std(0)))
        if not bool((spreads > 0).all()):
            raise UserError(f"`directions`: the images do not differ along one of those in '{self.path}'. Give others.")
        return replace(found, directions=found.directions * spreads, starts=found.directions * means, note="")

    def _names(self, number: int) -> list[str]:
        try:
            names = json.loads(self.metadata["names"])
        except (KeyError, ValueError):
            names = None
        fits = isinstance(names, list) and len(names) == number and all(isinstance(one, str) for one in names)
        cleaned = [" ".join("".join(c for c in one if c.isprintable()).split())[:80] for one in names] if fits else []
        return cleaned if cleaned and len({*cleaned}) == number else [f"direction {one}" for one in range(number)]

    def _encoder(self, number: int, channels: int) -> Tensor:
        """Weights and bias (K, C + 1) of what a ReLU makes activations of."""
        weights = self.encoder[ENCODER]
        weights = weights.T if weights.shape == (channels, number) else weights
        before, centre = (
            self.encoder.get(name, torch.zeros(size)) for name, size in zip(BIASES, (number, channels), strict=True)
        )
        if (weights.shape, before.shape, centre.shape) != ((number, channels), (number,), (channels,)):
            shapes = {name: list(one.shape) for name, one in self.encoder.items()}
            raise UserError(f"`key`: the encoder in '{self.path}' ({shapes}) does not fit {number} directions.")
        return torch.cat([weights, (before - weights @ centre)[:, None]], dim=1)


def _as_maps(vectors: Tensor, shape: list[int], everywhere: bool) -> Tensor | None:
    """Directions (K, C, 1, 1) or (K, C, h, w), if an array can be read so: concepts are in rows where both would do."""
    channels = shape[0]
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim == 2:
        rows = vectors if vectors.shape[1] == channels else vectors.T
        return rows.contiguous()[..., None, None] if rows.shape[1] == channels and len(rows) else None
    maps = vectors[None] if vectors.ndim == 3 else vectors
    fits = maps.ndim == 4 and len(maps) and [*maps.shape[1:]] in ([channels, 1, 1], [] if everywhere else shape)
    return maps if fits else None


def _tensors(path: Path, key: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Arrays of a file by name, of several only those that are used, and what safetensors says of them."""
    if not path.is_file():
        raise UserError(f"`concepts`: there is no file '{path}'. Give one of {', '.join(SUFFIXES)}.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"`concepts`: '{path}' is of no kind that is read. Give a file of {', '.join(SUFFIXES)}.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = _chosen(path, [*file.keys()], key)
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        if path.suffix == ".npy":
            return {_chosen(path, [ONLY_ARRAY], key)[0]: _tensor(np.load(path, "r", allow_pickle=False))}, {}
        with zipfile.ZipFile(path) as archive:
            if (size := sum(one.file_size for one in archive.infolist())) > LARGEST:
                raise ValueError(f"its arrays take {size} bytes, and {LARGEST} are allowed")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _tensor(arrays[name]) for name in _chosen(path, arrays.files, key)}, {}
    except UserError:  # which is a ValueError
        raise
    except (OSError, ValueError, EOFError, SafetensorError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"`concepts`: '{path}' cannot be read ({reason}). Give a complete file of arrays.") from error


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32) if array.dtype.kind in "fiu" else np.full(1, np.nan))


def _chosen(path: Path, names: list[str], key: str | None) -> list[str]:
    """The names to read of those in a file: that of the key first."""
    if (key is None and len(names) != 1) or (key is not None and key not in names):
        known = ", ".join(sorted(names)[:20])
        raise UserError(
            f"`key`: '{path}' has {known or 'no array'}, and {key or 'none of them'} was asked for. Give one."
        )
    chosen = key or names[0]
    return [chosen, *(name for name in (ENCODER, *BIASES, THRESHOLD) if name in names and name != chosen)]
