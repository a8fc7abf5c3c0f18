"""The Fréchet distance between two sets of features."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from featinv_pl.errors import UserError


class FrechetDistance(Metric):
    """Fréchet distance in the feature space of a network, such as `fd_<backbone>`.

    It is `fid` only with the Inception weights of 2015; values of different networks are not comparable. It is biased
    upwards when there are few samples for the number of features, so compare values of equal n only.

    Args:
        num_features: Channels of the feature map, or width of the feature vector.
        name: What the score is called.
    """

    full_state_update = False
    reads: ClassVar[tuple[str, str]] = ("features", "features")
    sums: Tensor
    outers: Tensor
    count: Tensor

    def __init__(self, num_features: int, name: str) -> None:
        super().__init__()
        self.num_features, self.name, size = num_features, name, num_features
        self.add_state("sums", torch.zeros(2, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outers", torch.zeros(2, size, size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, keys: Sequence[str] | None = None) -> None:
        """Add a batch of maps (B, C, h, w), which are pooled, or vectors (B, D): reconstructions and originals."""
        for side, features in enumerate((preds, target)):
            pooled = pool(features, self.num_features)
            self.sums[side] += pooled.sum(0)
            self.outers[side] += pooled.T @ pooled
        self.count += len(preds)

    def compute(self) -> dict[str, Tensor]:
        """The distance by name; NaN before two samples."""
        if self.count < 2:
            return {self.name: self.sums.new_tensor(torch.nan)}
        means = self.sums / self.count
        covariances = (self.outers - self.count * means.unsqueeze(2) * means.unsqueeze(1)) / (self.count - 1)
        return {self.name: frechet_distance(means[0], covariances[0], means[1], covariances[1])}


def pool(features: Tensor, num_features: int) -> Tensor:
    """Feature vectors (B, D), float64, from maps (B, D, h, w), or as they are.

    Raises:
        UserError: There are not `num_features` features.
    """
    if features.shape[1] != num_features:
        raise UserError(f"`num_features` is {num_features}, and there are {features.shape[1]} features.")
    features = features.double()
    return features.flatten(2).mean(2) if features.ndim > 2 else features


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson and Landau, 1982), by means (D,) and covariances (D, D).

    The trace of the root of the product of covariances is taken from a symmetric matrix with the same
    eigenvalues, sqrt(A) B sqrt(A), which is faster and stays real where a set has few samples. All are float64.
    """
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance: Tensor = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return distance.clamp(min=0)
