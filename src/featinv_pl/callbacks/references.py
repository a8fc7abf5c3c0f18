"""What reconstructions are measured against: other images, given as if they were reconstructions."""

import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from featinv_pl.data.entries import Sample, collate_samples
from featinv_pl.sampling.noise import generator
from featinv_pl.types import Batch, Views, key_hash

OTHERS = 64
CHUNK = 1024


class Floor:
    """Another image of the same source, chosen by key among 64 fixed ones at random.

    So an image has the same partner on every rank, in every batch and order.

    Args:
        samples: All of the source.
    """

    def __init__(self, samples: Dataset[Sample]) -> None:
        total = len(cast(Any, samples))
        order = torch.randperm(total, generator=generator("floor", total))[:OTHERS].tolist()
        self.others = collate_samples([samples[index] for index in order])
        self.indices = {key: index for index, key in enumerate(self.others["key"])}

    def __call__(self, batch: Batch) -> Views:
        """The partners of a batch. Of a set with one image, it is its own."""
        rows = [self._partner(key) for key in batch["key"]]
        views = _views(self.others, rows, batch["features"].device)
        return {**views, "partners": [self.others["key"][row] for row in rows]}

    def _partner(self, key: str) -> int:
        total = len(self.indices)
        row = key_hash(key) % total
        return (row + 1) % total if self.indices.get(key) == row else row


class Neighbours:
    """The training image with the most similar map, by the mean over locations of the cosine.

    Args:
        training: A shard set; of a large one, the first `limit` samples are searched, which extraction
            has put into random order. Their maps are held in memory in half precision.
        limit: At most so many.
        device: Where to search.
    """

    def __init__(self, training: Dataset[Sample], limit: int, device: torch.device) -> None:
        self.training = copy.copy(training)
        cast(Any, self.training).with_images = True  # training itself does without
        total = min(limit, len(cast(Any, training)))
        maps = (_directions(training[index]["features"].unsqueeze(0)) for index in range(total))
        self.maps = torch.cat([item.half() for item in maps]).to(device)

    def __call__(self, batch: Batch) -> Views:
        """The neighbours of a batch."""
        queries = _directions(batch["features"].to(self.maps.device))
        rows = torch.cat([queries @ maps.float().T for maps in self.maps.split(CHUNK)], dim=1).argmax(1).tolist()
        return _views(collate_samples([self.training[row] for row in rows]), slice(None), batch["features"].device)


def _directions(features: Tensor) -> Tensor:
    """Maps (B, C, h, w) as vectors (B, C * h * w) whose products are sums over locations of cosines."""
    return normalize(features.float(), dim=1).flatten(1)


def _views(batch: Batch, rows: Any, device: torch.device) -> Views:
    return {
        "images": batch["images"][rows].to(device),
        "features": batch["features"][rows].to(device),
        "logits": batch["logits"][rows].to(device),
    }
