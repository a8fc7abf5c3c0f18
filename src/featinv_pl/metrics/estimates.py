"""Scores with their uncertainty, by a bootstrap and by Wilson's intervals, and comparisons of them."""

from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Values = NDArray[np.float64]
"""(1,) or (1 + replicates,): a score, and what it is in each replicate of the bootstrap."""

Interval = tuple[float, float]

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A score with its uncertainty. Differences and ratios are taken replicate by replicate, so they are paired.

    Attributes:
        values: The score, and its replicates if it was resampled.
        count: Images that count; None for a distance between sets.
        exact: Its interval where the replicates do not give it: that of a share. Where a share is 0 or 1, as that of
            360 of 360, it is so in every replicate too, which does not make it certain.
    """

    values: Values
    count: int | None = None
    exact: Interval | None = None

    @classmethod
    def of_share(cls, values: Values, count: int, units: float) -> "Estimate":
        """A share of images, with Wilson's interval (1927).

        Args:
            values: See `Estimate`.
            count: Images that count.
            units: How many independent ones these amount to at least: fewer, if an image counts several times, as in
                a group of corruptions, or has its partner in common with others. Then the effective number of images
                (Kish, Survey Sampling, 1965), by which the variance of the replicates is that of a share, stands for
                n, between these two.
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
            (a, low_a, high_a), (b, low_b, high_b), r = self._limits(), other._limits(), self._correlation(other)
            below, above = (
                sqrt(max(0.0, one**2 - 2 * r * one * two + two**2))
                for one, two in ((a - low_a, high_b - b), (high_a - a, b - low_b))
            )
            interval = (a - b - below, a - b + above)
        return Estimate(self.values - other.values, self._common(other), interval)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        """The ratio; that of two shares has an interval made of theirs (Donner and Zou, 2012)."""
        interval = None
        if self.exact and other.exact:
            (a, low_a, high_a), (b, low_b, high_b), r = self._limits(), other._limits(), self._correlation(other)

            def solved(limit_a: float, limit_b: float) -> tuple[float, float]:
                product = a * b + r * (a - limit_a) * (b - limit_b)
                inner = product**2 - limit_a * limit_b * (2 * a - limit_a) * (2 * b - limit_b)
                return product, sqrt(max(0.0, inner))

            if low_b > 0:
                low = low_a * (2 * a - low_a) / sum(solved(low_a, high_b)) if low_a > 0 else 0.0
                interval = (low, sum(solved(high_a, low_b)) / (low_b * (2 * b - low_b)))
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(self.values / other.values, self._common(other), interval)

    def _limits(self) -> tuple[float, float, float]:
        assert self.exact is not None
        return float(self.values[0]), *self.exact

    def _common(self, other: "Estimate") -> int | None:
        counts = [count for count in (self.count, other.count) if count is not None]
        return min(counts, default=None)

    def _correlation(self, other: "Estimate") -> float:
        """The correlation of the replicates; 0 where one never varies, which gives the wider interval."""
        both = np.isfinite(self.values[1:]) & np.isfinite(other.values[1:])
        one, two = self.values[1:][both], other.values[1:][both]
        if not (one.std() > 0 and two.std() > 0):
            return 0.0
        return float(np.corrcoef(one, two)[0, 1])


def wilson(share: float, count: float) -> Interval:
    """The score interval of a share (Wilson, 1927).

    Args:
        share: In [0, 1].
        count: Of how many.
    """
    z = float(norm.ppf((1 + LEVEL) / 2))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
