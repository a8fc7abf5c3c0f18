"""The baselines beside the inverter: other images, given as if they were reconstructions."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch.utils.data import Dataset

from featinv_pl.data.shards.samples import Sample, collate_samples
from featinv_pl.errors import UserError
from featinv_pl.evaluation.methods import NEIGHBOUR, REGRESSION
from featinv_pl.evaluation.neighbours import Neighbours
from featinv_pl.evaluation.reconstructions import Baseline, Reconstruction
from featinv_pl.evaluation.regression import Regression
from featinv_pl.sampling.noise import generator
from featinv_pl.types import Batch, key_hash

PARTNERS = 64


class Floor:
    """Another image of the same test set, chosen at random by key among 64 fixed ones.

    An image therefore has the same partner on every rank, in every batch and order.
    """

    def __init__(self, samples: Dataset[Sample]) -> None:
        total = len(cast(Any, samples))
        order = torch.randperm(total, generator=generator("floor", total))[:PARTNERS].tolist()
        self.partners = collate_samples([samples[index] for index in order])
        self.rows = {key: row for row, key in enumerate(self.partners["key"])}

    def __call__(self, batch: Batch) -> Reconstruction:
        """The partners of a batch. In a set of one image, it is its own partner."""
        rows, device = [self._partner(key) for key in batch["key"]], batch["features"].device
        return {
            "images": self.partners["images"][rows].to(device),
            "features": self.partners["features"][rows].to(device),
            "logits": self.partners["logits"][rows].to(device),
            "partners": [self.partners["key"][row] for row in rows],
        }

    def _partner(self, key: str) -> int:
        total = len(self.rows)
        row = key_hash(key) % total
        return (row + 1) % total if self.rows.get(key) == row else row


def from_training_shards(
    trainer: Trainer, inverter: Any, data: Any, wanted: Sequence[str], note: Callable[[str], None]
) -> dict[str, Baseline]:
    """The wanted baselines that need the training shards of `FeatureShards`; `note` is told why one is missing."""
    shards = {REGRESSION: data.train, NEIGHBOUR: data.train if data.neighbours is None else data.neighbours}
    found: dict[str, Baseline] = {}
    for name in wanted:
        if not shards[name]:  # None, or without samples
            note(f"no {name}: there are no training samples. Give `data.train`")
            continue
        try:
            if name == REGRESSION:
                found[name] = Regression(trainer, inverter, shards[name], data.num_workers)
            else:
                found[name] = Neighbours(trainer, shards[name], data.num_workers, inverter.device)
        except UserError as error:
            note(f"no {name}: {error}")
    return found
