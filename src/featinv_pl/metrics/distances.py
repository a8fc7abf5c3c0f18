"""Distances between the features of reconstructions and of originals, as two sets."""

from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from featinv_pl.types import key_hash

_roots: deque[tuple[Tensor, Tensor]] = deque(maxlen=2)
"""Covariances and their roots: of the classifier's features, and of Inception's."""


class Distance(Metric):
    """A distance in the feature space of a network, of maps (B, C, h, w), which are pooled, or vectors (B, C).

    It is `fid` or `kid` only with the Inception weights of 2015; values of different networks are not comparable.
    """

    full_state_update = False
    reads: ClassVar[tuple[str, str]] = ("features", "features")

    def __init__(self, num_features: int, name: str) -> None:
        super().__init__()
        self.num_features, self.name = num_features, name


class FrechetDistance(Distance):
    """Fréchet distance. It is biased upwards with few samples for the features: compare values of equal n only."""

    sums: Tensor
    outers: Tensor
    count: Tensor

    def __init__(self, num_features: int, name: str) -> None:
        super().__init__(num_features, name)
        self.add_state("sums", torch.zeros(2, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outers", torch.zeros(2, num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, *_: Any) -> None:
        for side, features in enumerate((preds, target)):
            pooled = _pool(features)
            self.sums[side] += pooled.sum(0)
            self.outers[side] += pooled.T @ pooled
        self.count += len(preds)

    def compute(self) -> dict[str, Tensor]:
        if self.count < 2:
            return {self.name: self.sums.new_tensor(torch.nan)}
        means = self.sums / self.count
        covariances = (self.outers - self.count * means.unsqueeze(2) * means.unsqueeze(1)) / (self.count - 1)
        return {self.name: frechet_distance(means[1], covariances[1], means[0], covariances[0])}


class KernelDistance(Distance):
    """Squared maximum mean discrepancy with the cubic kernel of KID (Bińkowski et al., arXiv 1801.01401).

    Unbiased, so that values of different n are comparable and can be negative. KID averages over random subsets of
    1,000 samples; here the distance is computed once, over the `size` samples whose keys have the smallest hashes.
    They are a random subset too, but one that takes constant memory and does not depend on batches, order or ranks.
    """

    chosen: Tensor

    def __init__(self, num_features: int, name: str, size: int = 1000) -> None:
        super().__init__(num_features, name)
        self.size = size
        # A row is the hash of a key, the features of its reconstruction, and those of its original.
        empty = torch.full((size, 1 + 2 * num_features), torch.inf, dtype=torch.float64)
        self.add_state("chosen", empty, dist_reduce_fx=_smallest)

    def update(self, preds: Tensor, target: Tensor, keys: Sequence[str], *_: Any) -> None:
        hashes = torch.tensor([key_hash(key) for key in keys], dtype=torch.float64, device=self.chosen.device)
        wanted = hashes <= self.chosen[-1, 0]
        if wanted.any():
            pooled = [_pool(features[wanted]) for features in (preds, target)]
            rows = torch.cat([hashes[wanted].unsqueeze(1), *pooled], dim=1)
            self.chosen = _first(torch.cat([self.chosen, rows]), self.size)

    def compute(self) -> dict[str, Tensor]:
        rows = self.chosen[self.chosen[:, 0].isfinite(), 1:]
        if len(rows) < 2:
            return {self.name: self.chosen.new_tensor(torch.nan)}
        return {self.name: kernel_distance(*rows.chunk(2, dim=1))}


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson and Landau, 1982), by means (D,) and covariances (D, D).

    The trace of the root of the product of covariances is taken from a symmetric matrix with the same
    eigenvalues, sqrt(A) B sqrt(A), which is faster and stays real where a set has few samples. All are float64.
    The root of A is kept: all methods are compared with the same originals.
    """
    root = _root(covariance_a)
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance: Tensor = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return distance.clamp(min=0)


def _root(covariance: Tensor) -> Tensor:
    """The square root of a covariance (D, D), computed once as long as it is among the last few."""
    for known, root in _roots:
        if known.device == covariance.device and torch.equal(known, covariance):
            return root
    values, vectors = torch.linalg.eigh(covariance)
    made: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    _roots.append((covariance, made))
    return made


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


def _pool(features: Tensor) -> Tensor:
    """Feature vectors (B, D), float64, from maps (B, D, h, w), or as they are."""
    features = features.double()
    return features.flatten(2).mean(2) if features.ndim > 2 else features


def _first(rows: Tensor, size: int) -> Tensor:
    """The rows of the smallest hashes, in order; their first feature decides between equal ones."""
    rows = rows[rows[:, 1].argsort(stable=True)]
    return rows[rows[:, 0].argsort(stable=True)][:size]


def _smallest(states: Tensor) -> Tensor:
    return _first(states.flatten(0, 1), states.shape[1])
