"""Means over samples and their bootstrap, in constant memory."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from featinv_pl.types import key_hash


class SampleMetric(Metric):
    """Scores of single samples, averaged over those where they are finite.

    The state holds the mean and that of each replicate of a Poisson bootstrap (Chamandy et al., Estimating
    uncertainty for massive data streams, 2012): in a replicate, a sample counts as often as a Poisson variable of
    mean 1, seeded by the sample's key. Intervals therefore need no second pass, add up over ranks, and do not depend
    on the order of samples. Metrics of the same samples have the same weights, so their replicates are paired; test
    sets with the same image under the same key, such as its corruptions, are resampled by image.

    Args:
        replicates: How often to resample; 0 is the mean alone.

    Attributes:
        names: The scores; `shares` are those that are 0 or 1 for every sample, so that their means are shares.
        listed: Whether the table of samples lists them; those that follow from others are not listed.
        reads: Which entry or entries of the reconstruction, and which of the original, the metric compares.
        latest: (B, number of scores), the values of the last batch.
        sizes: Since `compute`, how many samples count for each score.
    """

    full_state_update = False
    names: ClassVar[tuple[str, ...]]
    shares: ClassVar[tuple[str, ...]] = ()
    listed: ClassVar[bool] = True
    reads: ClassVar[tuple[str | tuple[str, ...], str | tuple[str, ...]]]
    sums: Tensor
    counts: Tensor
    latest: Tensor

    def __init__(self, replicates: int = 0) -> None:
        super().__init__()
        self.replicates = replicates
        self.sizes: dict[str, int] = {}
        for name in ("sums", "counts"):
            shape = (1 + replicates, len(self.names))
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    @abstractmethod
    def score(self, preds: Any, target: Any) -> Tensor:
        """Scores (B, number of scores), float64, of reconstructions (B, ...) and what `reads` says of the originals."""

    def update(self, preds: Any, target: Any, keys: Sequence[str] = (), partners: Sequence[str] | None = None) -> None:
        """Add a batch, as for `score`. The keys of its samples seed the bootstrap.

        `partners` are the keys of the images in `preds`, if these are other images of the set, shared by samples: they
        are resampled too (the pigeonhole bootstrap of Owen, 2007).
        """
        self.latest = self.score(preds, target)
        finite = self.latest.isfinite()
        weights = torch.ones(len(finite), 1 + self.replicates, dtype=torch.float64)
        if self.replicates:
            for names in (keys, partners):
                if names is not None:
                    weights[:, 1:] *= poisson_weights(tuple(names), self.replicates)
        weights = weights.to(self.latest.device)
        self.sums += weights.T @ self.latest.where(finite, 0)
        self.counts += weights.T @ finite.double()

    def compute(self) -> dict[str, Tensor]:
        """Means by name, NaN before any sample: scalars, or with replicates (1 + replicates,), the mean first."""
        self.sizes = dict(zip(self.names, self.counts[0].long().tolist(), strict=True))
        means = (self.sums / self.counts).T
        return dict(zip(self.names, means if self.replicates else means[:, 0], strict=True))


@lru_cache(maxsize=2)
def poisson_weights(keys: tuple[str, ...], replicates: int) -> Tensor:
    """How often each sample counts in each replicate: (len(keys), replicates), float64.

    Each row is a function of its key alone. Kept for the last batch and its partners, whose metrics share it.
    """
    rngs = (np.random.Generator(np.random.SFC64(key_hash(key))) for key in keys)
    return torch.from_numpy(np.stack([rng.poisson(1.0, replicates) for rng in rngs])).double()
