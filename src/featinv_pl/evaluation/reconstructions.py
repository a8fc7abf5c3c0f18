"""Every way of reconstructing a batch that is scored, and the cache from which an interrupted test resumes."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from featinv_pl.evaluation.results import CEILING, FLOOR, INVERSION, ORIGINAL
from featinv_pl.files import write_bytes
from featinv_pl.inverter.identity import hashed
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.types import Batch, Observation, from_uint8, to_uint8

CACHE = "reconstructions"
Baseline = Callable[[Batch], Observation]
logger = logging.getLogger("featinv_pl")


class Reconstruction(Observation):
    """Reconstructions of a batch by one method, as the classifier reads them."""

    partners: NotRequired[list[str]]  # keys of the images, where these are other images of the same test set
    sample_images: NotRequired[Tensor]  # (B, n, 3, H, W): n samples of each feature map, of which `images` is the first
    sample_features: NotRequired[Tensor]  # (B, n, C, h, w)


class ImageCache:
    """Stores reconstructed images, so that an interrupted test resumes with the same command.

    An image is found by everything that determines it: identity and control of the inverter, precision, seed,
    sampler, key and feature map. Tests with other batch sizes, processes, metrics, held-out classifiers or pictures
    reuse it, and a change of the model or of the data is never overlooked. `reconstructions/` in the folder of the run
    gets a file of bytes for each batch and sampler; it may be removed at any time.
    """

    def __init__(self, root: Path, model: Mapping[str, Any]) -> None:
        self.folder, self.model = root / CACHE, model
        self.files: dict[str, Path] = {}
        self._hashed: tuple[Tensor, list[str]] | None = None
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self.files |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError):
                logger.warning("'%s' cannot be read; its images are reconstructed again.", path)

    def names(self, sampler: Sampler, keys: Sequence[str], features: Tensor) -> list[str]:
        model = hashed({**self.model, "sampler": asdict(sampler)})
        if self._hashed is None or self._hashed[0] is not features:  # once for all samplers
            maps = features.half().cpu().contiguous().numpy()  # as they are stored
            self._hashed = features, [hashlib.blake2b(one.tobytes(), digest_size=16).hexdigest() for one in maps]
        return [
            hashlib.blake2b(f"{model} {key} {one}".encode(), digest_size=16).hexdigest()
            for key, one in zip(keys, self._hashed[1], strict=True)
        ]

    def read(self, names: Sequence[str]) -> dict[int, Tensor]:
        """The images (3, H, W) in [-1, 1] that are stored, by position among the names."""
        found = {}
        for place, name in enumerate(names):
            if name in self.files:
                with safe_open(self.files[name], "pt") as file:
                    found[place] = from_uint8(file.get_tensor(name))
        return found

    def write(self, images: Mapping[str, Tensor]) -> None:
        """Store images (3, H, W) under their names, except those with NaN or Inf, which bytes cannot express."""
        finite = {name: to_uint8(image).cpu().contiguous() for name, image in images.items() if image.isfinite().all()}
        if finite:
            write_bytes(self.folder / f"{hashed([*finite])}.safetensors", save(finite))


@dataclass
class Reconstructions:
    """Reconstructs batches by every method: the inverter's own sampler, further samplers, and baselines.

    With `num_samples` above 1, the own sampler gives several reconstructions of each feature map. `ceilings` keeps what
    the autoencoder decodes, as bytes by name, for whoever reconstructs the same batches again.
    """

    inverter: Any
    samplers: Mapping[str, Sampler]
    num_samples: int = 1
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    cache: ImageCache | None = None
    ceilings: dict[str, Tensor] | None = None

    @property
    def methods(self) -> list[str]:
        return [INVERSION, *self.samplers, CEILING, ORIGINAL, *self.baselines]

    @torch.no_grad()
    def __call__(self, batch: Batch, floor: Baseline | None = None) -> dict[str, Reconstruction]:
        """Reconstruct a batch by every method; `floor` is the baseline of its test set, if it has one."""
        baselines = self.baselines if floor is None else {**self.baselines, FLOOR: floor}
        made = {
            INVERSION: self._samples(batch),
            CEILING: self._ceiling(batch),
            ORIGINAL: cast(Reconstruction, batch),
            **{name: self.sample(batch, sampler) for name, sampler in self.samplers.items()},
        }
        return made | {name: cast(Reconstruction, baseline(batch)) for name, baseline in baselines.items()}

    def _samples(self, batch: Batch) -> Reconstruction:
        suffixes = ["", *(f" sample {number}" for number in range(1, self.num_samples))]
        made = [self.sample(batch, self.inverter.sampler, suffix) for suffix in suffixes]
        if len(made) > 1:
            made[0]["sample_images"] = torch.stack([one["images"] for one in made], dim=1)
            made[0]["sample_features"] = torch.stack([one["features"] for one in made], dim=1)
        return made[0]

    def sample(self, batch: Batch, sampler: Sampler, suffix: str = "") -> Reconstruction:
        features, keys = batch["features"], [key + suffix for key in batch["key"]]
        names = keys if self.cache is None else self.cache.names(sampler, keys, features)
        stored = {} if self.cache is None else self.cache.read(names)
        images = {row: image.to(features.device) for row, image in stored.items()}
        if missing := [row for row in range(len(keys)) if row not in images]:
            chosen = [keys[row] for row in missing]
            new = self.inverter.reconstruct(features[missing], chosen, torch.initial_seed(), sampler)
            images |= dict(zip(missing, new, strict=True))
            if self.cache is not None:
                self.cache.write({names[row]: images[row] for row in missing})
        stacked = torch.stack([images[row] for row in range(len(keys))])
        observation = cast(Reconstruction, self.inverter.classifier.classify(stacked))
        # Quantised NaNs look like valid pixels, so the features are marked instead.
        observation["features"][~stacked.flatten(1).isfinite().all(1)] = torch.nan
        return observation

    def _ceiling(self, batch: Batch) -> Reconstruction:
        autoencoder, moments = self.inverter.prior.autoencoder, batch["moments"]
        names = [f"{source}/{key}" for source, key in zip(batch["source"], batch["key"], strict=True)]
        if self.ceilings is not None and self.ceilings.keys() >= {*names}:
            images = from_uint8(torch.stack([self.ceilings[name] for name in names]).to(moments.device))
        else:
            images = self.inverter.decode(autoencoder.sample(moments, torch.zeros_like(moments.chunk(2, dim=1)[0])))
            if self.ceilings is not None:
                self.ceilings |= zip(names, to_uint8(images).cpu(), strict=True)
        return cast(Reconstruction, self.inverter.classifier.classify(images))
