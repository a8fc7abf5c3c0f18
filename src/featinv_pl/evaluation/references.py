"""What reconstructions are measured against: other images, given as if they were reconstructions."""

from typing import Any, cast

import torch
from torch.utils.data import Dataset

from featinv_pl.data.shards.samples import Sample, collate_samples
from featinv_pl.sampling.noise import generator
from featinv_pl.types import Batch, Observation, key_hash

OTHERS = 64


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

    def __call__(self, batch: Batch) -> Observation:
        """The partners of a batch. Of a set with one image, it is its own."""
        rows = [self._partner(key) for key in batch["key"]]
        observation = _views(self.others, rows, batch["features"].device)
        return {**observation, "partners": [self.others["key"][row] for row in rows]}

    def _partner(self, key: str) -> int:
        total = len(self.indices)
        row = key_hash(key) % total
        return (row + 1) % total if self.indices.get(key) == row else row


def _views(batch: Batch, rows: Any, device: torch.device) -> Observation:
    return {
        "images": batch["images"][rows].to(device),
        "features": batch["features"][rows].to(device),
        "logits": batch["logits"][rows].to(device),
    }
