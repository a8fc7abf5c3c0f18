"""Scores with their uncertainty, by a bootstrap and by Wilson's intervals, and comparisons image by image."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from featinv_pl.metrics.sample_metric import poisson_weights

Values = NDArray[np.float64]
Interval = tuple[float, float]
LEVEL = 0.95
CHUNK = 4096  # images whose weights are in memory at the same time


@dataclass(frozen=True)
class Estimate:
    """A score with its uncertainty. Differences and ratios are taken replicate by replicate, so they are paired.

    A share has an interval of its own (`exact`): where it is 0 or 1, as that of 360 of 360, it is so in every replicate
    too, which does not make it certain.
    """

    values: Values  # (1,) or (1 + replicates,): the score, and what it is in each replicate of the bootstrap
    count: int | None = None  # images that count; None for a distance between sets
    exact: Interval | None = None

    @classmethod
    def of_share(cls, values: Values, count: int, units: float) -> "Estimate":
        """A share of `count` images, with Wilson's interval (1927).

        These are at least `units` independent ones: fewer than `count`, if an image counts several times, as in a group
        of corruptions, or has its partner in common with others. Then the effective number of images (Kish, Survey
        Sampling, 1965), by which the variance of the replicates is that of a share, stands for n.
        """
        if len(values) == 1 or not np.isfinite(values[0]):
            return cls(values, count)
        share, effective = values[0], float(count)
        if units < count:
            variance = np.var(values[1:][np.isfinite(values[1:])])
            effective = float(np.clip(share * (1 - share) / variance, units, count)) if variance else units
        return cls(values, count, wilson(share, effective))

    @cached_property
    def interval(self) -> Interval | None:
        """The 95 % confidence interval; None without replicates."""
        if self.exact is not None or len(self.values) == 1:
            return self.exact
        # A replicate of few samples can lack all that count, or the difference that a ratio divides by.
        low, high = np.percentile(self.values[np.isfinite(self.values)], [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        return float(low), float(high)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference; that of two shares has an interval made of theirs (Zou and Donner, 2008)."""
        interval = None
        if self.exact and other.exact:
            a, b, r = self.values[0], other.values[0], self._correlation(other)
            (low_a, high_a), (low_b, high_b) = self.exact, other.exact
            below, above = (
                sqrt(max(0.0, one**2 - 2 * r * one * two + two**2))
                for one, two in ((a - low_a, high_b - b), (high_a - a, b - low_b))
            )
            interval = (float(a - b - below), float(a - b + above))
        return Estimate(self.values - other.values, self._common(other), interval)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        """The ratio; that of two shares has an interval made of theirs (Donner and Zou, 2012)."""
        interval = None
        if self.exact and other.exact and other.exact[0] > 0:
            a, b, r = self.values[0], other.values[0], self._correlation(other)
            (low_a, high_a), (low_b, high_b) = self.exact, other.exact

            def solved(limit_a: float, limit_b: float) -> tuple[float, float]:
                product = a * b + r * (a - limit_a) * (b - limit_b)
                inner = product**2 - limit_a * limit_b * (2 * a - limit_a) * (2 * b - limit_b)
                return product, sqrt(max(0.0, inner))

            low = low_a * (2 * a - low_a) / sum(solved(low_a, high_b)) if low_a > 0 else 0.0
            interval = (float(low), float(sum(solved(high_a, low_b)) / (low_b * (2 * b - low_b))))
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(self.values / other.values, self._common(other), interval)

    def _common(self, other: "Estimate") -> int | None:
        return min((count for count in (self.count, other.count) if count is not None), default=None)

    def _correlation(self, other: "Estimate") -> float:
        """The correlation of the replicates; 0 where one never varies, which gives the wider interval."""
        both = np.isfinite(self.values[1:]) & np.isfinite(other.values[1:])
        one, two = self.values[1:][both], other.values[1:][both]
        return float(np.corrcoef(one, two)[0, 1]) if one.std() > 0 and two.std() > 0 else 0.0


def wilson(share: float, count: float) -> Interval:
    """The score interval of a share of `count` images (Wilson, 1927)."""
    z = float(norm.ppf((1 + LEVEL) / 2))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


class ImageSums:
    """Sums and counts (images, width) of scores, by image, which may count several times, as do its corruptions.

    `rows` is the place of each image by key. Values that are not finite do not count.
    """

    def __init__(self, width: int) -> None:
        self.rows: dict[str, int] = {}
        self.sums, self.counts = np.zeros((2, 0, width))

    def add(self, keys: Sequence[str], values: Values) -> None:
        places = [self.rows.setdefault(key, len(self.rows)) for key in keys]
        more = [(0, len(self.rows) - len(self.sums)), (0, 0)]
        self.sums, self.counts = np.pad(self.sums, more), np.pad(self.counts, more)
        finite = np.isfinite(values)
        np.add.at(self.sums, places, np.where(finite, values, 0))
        np.add.at(self.counts, places, finite)


def estimates(
    keys: Sequence[str], sums: Values, counts: Values, shares: Sequence[bool], replicates: int
) -> list[Estimate]:
    """Means over images, resampled by image as in `SampleMetric`, from sums and counts (images, columns).

    `shares` says which columns are means of zeros and ones.
    """
    totals = np.zeros((2, 1 + replicates, sums.shape[1]))
    for start in range(0, len(keys), CHUNK):
        part = slice(start, start + CHUNK)
        weights = np.ones((1 + replicates, len(keys[part])))
        weights[1:] = poisson_weights(tuple(keys[part]), replicates).numpy().T
        totals += np.stack([weights @ sums[part], weights @ counts[part]])
    with np.errstate(divide="ignore", invalid="ignore"):
        means = totals[0] / totals[1]
    return [
        Estimate.of_share(values, int(column.sum()), int(np.count_nonzero(column)))
        if share
        else Estimate(values, int(column.sum()))
        for values, column, share in zip(means.T, counts.T, shares, strict=True)
    ]


def ratios(own: ImageSums, reference: ImageSums, shares: Sequence[bool], replicates: int) -> list[Estimate]:
    """Scores divided by those of the same images elsewhere: images that only one side has do not count.

    An image may count several times in `own`; its value in `reference` then counts as often.
    """
    keys = [key for key in own.rows if key in reference.rows]
    ours, theirs = ([side.rows[key] for key in keys] for side in (own, reference))
    known = reference.counts[theirs] > 0
    counts = own.counts[ours] * known
    sums = own.sums[ours] * known, reference.sums[theirs] * counts
    above, below = (estimates(keys, side, counts, shares, replicates) for side in sums)
    return [one / other for one, other in zip(above, below, strict=True)]
