"""A baseline that looks up instead of inverting: the training image with the most similar feature map."""

import copy
from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize
from torch.utils.data import Dataset

from featinv_pl.data.order import Batches, cut
from featinv_pl.data.shards.reader import DamagedError, ShardSet
from featinv_pl.data.shards.samples import Sample, collate_samples
from featinv_pl.data.workers import loader
from featinv_pl.runtime.progress import progress
from featinv_pl.runtime.ranks import agree, rows_of_all_ranks
from featinv_pl.types import Batch, Observation

MEMORY = 4 << 30  # bytes, in which the maps of 25,000 images of ConvNeXt at 288 pixels fit unabridged
CANDIDATES = 32
READ, COMPARED = 64, 1 << 26  # images read at a time, and numbers that are compared at a time


class Neighbours:
    """The training image with the most similar feature map, by the cosine averaged over locations.

    All images are searched. Every rank holds their maps in half precision. If these take more than `memory`, they
    are averaged over coarser grids, at most over all locations; the search then gives `CANDIDATES`, whose complete
    maps, read from the shards, decide.

    Args:
        trainer: Of the test.
        training: The shard set to search.
        num_workers: Processes that read.
        device: Where to search.
        memory: Bytes on the device, twice that while maps are read; more only if one vector per image is more.

    Raises:
        UserError: The shards cannot be read.
    """

    def __init__(
        self, trainer: Trainer, training: ShardSet, num_workers: int, device: torch.device, memory: int = MEMORY
    ) -> None:
        self.maps, self.pictures, self.device = copy.copy(training), copy.copy(training), device
        self.maps.with_images, self.pictures.with_images = False, True
        channels, *size = training.manifest["provenance"]["feature_shape"]
        places = memory // (2 * channels * max(len(training), 1))
        self.grid = next((grid for grid in _grids(size) if grid[0] * grid[1] <= places), (1, 1))
        self.exact = self.grid == tuple(size)
        batches = cut([range(len(training))], READ)[trainer.global_rank :: trainer.world_size]
        reader = _Summaries(self.maps, self.grid)
        read = loader(reader, Batches(batches), num_workers, again=False)
        parts = agree(lambda: list(progress(trainer, "training maps", "batch", read)))
        nothing = torch.empty(0, dtype=torch.long), torch.empty(0, channels * self.grid[0] * self.grid[1]).half()
        self.numbers, self.vectors = (
            rows_of_all_ranks(torch.cat(rows).to(device)) for rows in zip(nothing, *parts, strict=True)
        )

    def __call__(self, batch: Batch) -> Observation:
        """The neighbours of a batch."""
        queries = batch["features"].to(self.device)
        with torch.autocast(self.device.type, enabled=False):  # which would compare in half precision
            found = [self._nearest(query, rows) for query, rows in zip(queries, self._candidates(queries), strict=True)]
        samples, device = collate_samples(found), batch["features"].device
        return {
            "images": samples["images"].to(device),
            "features": samples["features"].to(device),
            "logits": samples["logits"].to(device),
        }

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

    def _nearest(self, query: Tensor, numbers: list[int]) -> Sample:
        """The nearest candidate of a map (C, h, w) whose picture can be read."""
        if not self.exact:
            maps = torch.stack([self.maps.stored(number)["features"] for number in numbers]).to(self.device)
            size = (query.shape[1], query.shape[2])
            similarity = summarise(maps, size) @ summarise(query.unsqueeze(0), size)[0]
            numbers = [numbers[place] for place in similarity.argsort(descending=True).tolist()]
        pictures = map(self._picture, numbers)
        return next(sample for sample in pictures if sample is not None)

    def _picture(self, number: int) -> Sample | None:
        """A sample with its picture; None if it is damaged and the set skips such samples."""
        try:
            return self.pictures[number]
        except DamagedError:
            if self.pictures.on_error == "raise":
                raise
            return None


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


def _grids(size: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Grids from that of the map itself to ever coarser ones."""
    height, width = size
    return ((min(side, height), min(side, width)) for side in range(max(size), 0, -1))
