"""The kernel distance between two sets of features."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from featinv_pl.metrics.frechet import pool
from featinv_pl.types import key_hash


class KernelDistance(Metric):
    """Squared maximum mean discrepancy with the cubic kernel of KID (Bińkowski et al., arXiv 1801.01401).

    Unbiased, so that values of different n are comparable and can be negative. A reconstruction resembles
    its own original, so pairs of the two are left out: with them, equal distributions would score below zero.
    KID averages over random subsets of 1,000 samples; here the distance is computed once, over the `size`
    samples whose keys have the smallest hashes. They are a random subset too, but one that takes constant
    memory and does not depend on batches, order or ranks. A set of at most `size` samples is used completely.

    It is `kid` only with the Inception weights of 2015.

    Args:
        num_features: Channels of the feature map, or width of the feature vector.
        name: What the score is called.
        size: Most samples that count.
    """

    full_state_update = False
    reads: ClassVar[tuple[str, str]] = ("features", "features")
    chosen: Tensor

    def __init__(self, num_features: int, name: str, size: int = 1000) -> None:
        super().__init__()
        self.num_features, self.name, self.size = num_features, name, size
        # A row is the hash of a key, the features of its reconstruction, and those of its original.
        empty = torch.full((size, 1 + 2 * num_features), torch.inf, dtype=torch.float64)
        self.add_state("chosen", empty, dist_reduce_fx=_smallest)

    def update(self, preds: Tensor, target: Tensor, keys: Sequence[str]) -> None:
        """Add a batch of maps (B, C, h, w), which are pooled, or vectors (B, D), whose keys decide if they count."""
        hashes = torch.tensor([key_hash(key) for key in keys], dtype=torch.float64, device=self.chosen.device)
        wanted = hashes <= self.chosen[-1, 0]
        if wanted.any():
            pooled = [pool(features[wanted], self.num_features) for features in (preds, target)]
            rows = torch.cat([hashes[wanted].unsqueeze(1), *pooled], dim=1)
            self.chosen = _first(torch.cat([self.chosen, rows]), self.size)

    def compute(self) -> dict[str, Tensor]:
        """The distance by name; NaN before two samples."""
        rows = self.chosen[self.chosen[:, 0].isfinite(), 1:]
        if len(rows) < 2:
            return {self.name: self.chosen.new_tensor(torch.nan)}
        return {self.name: kernel_distance(*rows.chunk(2, dim=1))}


def _first(rows: Tensor, size: int) -> Tensor:
    """The rows of the smallest hashes, in order; their first feature decides between equal ones."""
    rows = rows[rows[:, 1].argsort(stable=True)]
    return rows[rows[:, 0].argsort(stable=True)][:size]


def _smallest(states: Tensor) -> Tensor:
    """Reduce the states of several metrics, (N, size, ...), to that of all their samples."""
    return _first(states.flatten(0, 1), states.shape[1])


def kernel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased estimate, from n pairs, of the squared maximum mean discrepancy with k(x, y) = (x y / D + 1)^3.

    Row i of `a` and row i of `b`, both (n, D), may depend on each other, such as a reconstruction and its original;
    all three terms are means over i != j (Gretton et al., JMLR 13, 2012, lemma 6).
    """
    size, width = a.shape

    def across(x: Tensor, y: Tensor) -> Tensor:
        kernel = (x @ y.T / width + 1) ** 3
        return (kernel.sum() - kernel.trace()) / (size * (size - 1))

    return across(a, a) + across(b, b) - 2 * across(a, b)
