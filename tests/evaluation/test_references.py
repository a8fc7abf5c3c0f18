"""The floor: another image of the same source, whatever the batch."""

from typing import Any

import torch

from conftest import MakeBatch
from featinv_pl.evaluation.references import Floor


def test_floor_is_another_image_and_the_same_in_every_batch(make_batch: MakeBatch) -> None:
    batch: Any = make_batch(40)
    samples: Any = [
        {name: value[row] for name, value in batch.items() if name != "labels"} | {"labels": int(batch["labels"][row])}
        for row in range(40)
    ]
    floor = Floor(samples)
    partners = floor(batch)["images"]
    for row in range(40):
        assert not torch.equal(partners[row], batch["images"][row])
        alone: Any = {name: value[row : row + 1] for name, value in batch.items()}
        assert torch.equal(floor(alone)["images"][0], partners[row])
