"""The baselines beside the inverter: another image, regressions, and the training image with the nearest map."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize
from torch.utils.data import Dataset

from featinv_pl.data.order import Batches, ShuffledBatches, cut
from featinv_pl.data.shards.manifest import seal
from featinv_pl.data.shards.reader import BatchReader, DamagedError, ShardSet
from featinv_pl.data.shards.samples import Sample, collate_samples, widen
from featinv_pl.data.workers import loader
from featinv_pl.errors import UserError
from featinv_pl.evaluation.reconstructions import Baseline, Reconstruction
from featinv_pl.evaluation.results import NEIGHBOUR, RIDGE
from featinv_pl.files import write_bytes
from featinv_pl.nets.regression import LatentRegression, RidgeRegression, fit, fit_ridge
from featinv_pl.runtime.progress import progress
from featinv_pl.runtime.ranks import agree, of_all_ranks, rows_of_all_ranks
from featinv_pl.sampling.noise import generator
from featinv_pl.types import Batch, key_hash

PARTNERS = 64
STEPS, EPOCHS, BATCH_SIZE = 4000, 50, 64  # whichever of steps and epochs ends first
IDENTITY = "identity"
MEMORY = 4 << 30  # bytes, in which the maps of 25,000 images of ConvNeXt at 288 pixels fit unabridged
CANDIDATES = 32
READ, COMPARED = 64, 1 << 26  # images read at a time, and numbers that are compared at a time
READERS = 4  # threads, each of which decodes a picture
TENSORS = ("images", "features", "logits")


class Floor:
    """Another image of the same test set, chosen by key among 64 fixed ones: the same in every batch and on every rank.

    In a set of one image, it is its own partner.
    """

    def __init__(self, samples: Dataset[Sample]) -> None:
        total = len(cast(Any, samples))
        order = torch.randperm(total, generator=generator("floor", total))[:PARTNERS].tolist()
        self.partners: Any = collate_samples([samples[index] for index in order])
        self.rows = {key: row for row, key in enumerate(self.partners["key"])}

    def __call__(self, batch: Batch) -> Reconstruction:
        rows, device = [self._partner(key) for key in batch["key"]], batch["features"].device
        made = {name: self.partners[name][rows].to(device) for name in TENSORS}
        return cast(Reconstruction, made | {"partners": [self.partners["key"][row] for row in rows]})

    def _partner(self, key: str) -> int:
        total = len(self.rows)
        row = key_hash(key) % total
        return (row + 1) % total if self.rows.get(key) == row else row


class Regression:
    """Decodes the latents that a regression, by convolutions or a ridge, predicts from a feature map.

    The regression is fitted to the training shards, convolutions in the run's precision, in an order that the seed
    determines, and kept in `<default_root_dir>/<name>.safetensors` for further tests with the same shards and seed.
    Each rank fits it, so that none waits for another for long, and takes the weights of the first.
    """

    def __init__(self, name: str, trainer: Trainer, inverter: Any, training: ShardSet, num_workers: int) -> None:
        self.name, self.trainer, self.inverter = name, trainer, inverter
        self.training, self.num_workers = training, num_workers
        seed, path = torch.initial_seed(), Path(trainer.default_root_dir) / f"{name}.safetensors"
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = inverter.prior.latent_grid(inverter.image_size)
            network = RidgeRegression if name == RIDGE else LatentRegression
            self.network = network(inverter.classifier.feature_shape, shape).to(inverter.device)
        self.order = ShuffledBatches(training.shard_sizes, min(BATCH_SIZE, len(training)), 0, 1, seed)
        self.steps = min(STEPS, (1 if name == RIDGE else EPOCHS) * len(self.order))
        settings = f"{seal(training.manifest)} {self.network} seed {seed}, {self.steps} steps of {BATCH_SIZE}"
        settings += f" in {trainer.precision}"
        identity = hashlib.sha256(settings.encode()).hexdigest()
        weights = _read(path, identity)
        if not all(of_all_ranks(weights is not None)):
            weights = trainer.strategy.broadcast(agree(self._fit))
            if trainer.is_global_zero:
                write_bytes(path, save(weights, {IDENTITY: identity}))
        self.network.load_state_dict(cast(dict[str, Tensor], weights))
        self.network.eval()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Reconstruction:
        images = self.inverter.decode(self.network(batch["features"]))
        return cast(Reconstruction, self.inverter.classifier.classify(images))

    def _fit(self) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            if isinstance(self.network, RidgeRegression):
                error = fit_ridge(self.network, self._batches())
            else:
                error = fit(self.network, self._batches(), self.steps, self.trainer.precision_plugin.forward_context)
        if not isfinite(error):
            raise UserError(f"its error after {self.steps} steps is {error}")
        return {name: value.cpu() for name, value in self.network.state_dict().items()}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Feature maps and mean latents of one epoch after another."""
        order: list[Sequence[int]] = []
        while len(order) < self.steps:
            order += self.order
            self.order.set_epoch(self.order.epoch + 1)
        reader, batches = BatchReader(self.training), Batches(order[: self.steps])
        read, device = loader(reader, batches, self.num_workers, again=False), self.inverter.device
        for batch in progress(self.trainer, self.name, "step", read):
            moments = batch["moments"].to(device).float()
            mean = self.inverter.prior.autoencoder.sample(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
            yield batch["features"].to(device).float(), mean


class Neighbours:
    """The training image with the most similar feature map, by the cosine averaged over locations.

    All images are searched. Every rank holds their maps in half precision, in `MEMORY` bytes on the device (twice that
    while they are read). Of larger sets, the maps are averaged over coarser grids, at most over all locations; the
    search then gives `CANDIDATES`, whose complete maps, read from the shards, decide.
    """

    def __init__(self, trainer: Trainer, training: ShardSet, num_workers: int, device: torch.device) -> None:
        self.maps, self.pictures, self.device = copy.copy(training), copy.copy(training), device
        self.maps.with_images, self.pictures.with_images = False, True
        self.readers = ThreadPoolExecutor(READERS)
        channels, *size = training.manifest["provenance"]["feature_shape"]
        places = MEMORY // (2 * channels * max(len(training), 1))
        grids = [(min(side, size[0]), min(side, size[1])) for side in range(max(size), 0, -1)]
        self.grid = next((grid for grid in grids if grid[0] * grid[1] <= places), (1, 1))
        self.exact = self.grid == tuple(size)
        batches = Batches(cut([range(len(training))], READ)[trainer.global_rank :: trainer.world_size])
        read = loader(_Summaries(self.maps, self.grid), batches, num_workers, again=False)
        parts = agree(lambda: list(progress(trainer, "training maps", "batch", read)))
        nothing = torch.empty(0, dtype=torch.long), torch.empty(0, channels * self.grid[0] * self.grid[1]).half()
        self.numbers, self.vectors = (
            rows_of_all_ranks(torch.cat(rows).to(device)) for rows in zip(nothing, *parts, strict=True)
        )

    def __call__(self, batch: Batch) -> Reconstruction:
        queries, device = batch["features"].to(self.device), batch["features"].device
        with torch.autocast(self.device.type, enabled=False):  # which would compare in halves, and knows no bytes
            candidates = self._candidates(queries)
            if not self.exact:
                candidates = [self._in_order(query, rows) for query, rows in zip(queries, candidates, strict=True)]
            samples: Any = widen(collate_samples([*self.readers.map(self._picture, candidates)]))
        return cast(Reconstruction, {name: samples[name].to(device) for name in TENSORS})

    def _candidates(self, queries: Tensor) -> list[list[int]]:
        """Numbers of training samples for each map (B, C, h, w), most similar first."""
        targets = summarise(queries, self.grid)
        found = []
        for first in range(0, len(self.vectors), step := max(COMPARED // targets.shape[1], 1)):
            similarity = targets @ self.vectors[first : first + step].float().T
            values, rows = similarity.topk(min(CANDIDATES, similarity.shape[1]), dim=1)
            found.append((values, rows + first))
        values, rows = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        best = values.topk(min(CANDIDATES, values.shape[1]), dim=1).indices
        return self.numbers[rows.gather(1, best)].tolist()

    def _in_order(self, query: Tensor, numbers: list[int]) -> list[int]:
        """The candidates of a map (C, h, w), most similar first by their complete maps."""
        samples = self.readers.map(self.maps.stored, numbers)
        maps = torch.stack([sample["features"] for sample in samples]).to(self.device)
        size = (query.shape[1], query.shape[2])
        similarity = summarise(maps, size) @ summarise(query.unsqueeze(0), size)[0]
        return [numbers[place] for place in similarity.argsort(descending=True).tolist()]

    def _picture(self, numbers: list[int]) -> Sample:
        """The nearest candidate whose picture can be read."""
        while True:
            try:
                return self.pictures.stored(numbers[0])
            except DamagedError:
                if self.pictures.on_error == "raise" or not (numbers := numbers[1:]):
                    raise


def from_training_shards(
    trainer: Trainer, inverter: Any, data: Any, wanted: Sequence[str], note: Callable[[str], None]
) -> dict[str, Baseline]:
    """The wanted baselines that need training shards; `note` is told why one is missing."""
    neighbours = data.train if data.neighbours is None else data.neighbours
    found: dict[str, Baseline] = {}
    for name in wanted:
        try:
            if not (training := neighbours if name == NEIGHBOUR else data.train):  # None, or without samples
                raise UserError("there are no training samples. Give `data.train`")
            if name == NEIGHBOUR:
                found[name] = Neighbours(trainer, training, data.num_workers, inverter.device)
            else:
                found[name] = Regression(name, trainer, inverter, training, data.num_workers)
        except UserError as error:
            note(f"no {name}: {error}")
    return found


class _Summaries(Dataset[tuple[Tensor, Tensor]]):
    """Numbers of samples and their maps, averaged over a grid, in half precision: a batch at a time."""

    def __init__(self, shards: ShardSet, grid: tuple[int, int]) -> None:
        self.shards, self.grid = shards, grid

    def __getitem__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        found: list[int] = []
        maps: list[Tensor] = []
        for number in numbers:
            try:
                maps.append(self.shards.stored(number)["features"])
                found.append(number)
            except DamagedError:
                if self.shards.on_error == "raise":
                    raise
        return torch.tensor(found, dtype=torch.long), summarise(torch.stack(maps), self.grid).half()


def summarise(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w), averaged over a grid, as vectors (B, D) whose products are sums of the cells' cosines."""
    return normalize(adaptive_avg_pool2d(maps.float(), grid), dim=1).flatten(1)


def _read(path: Path, identity: str) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get(IDENTITY) == identity
            return {name: file.get_tensor(name) for name in file.keys()} if same else None  # noqa: SIM118
    except (OSError, SafetensorError):  # missing or damaged: fit again
        return None
