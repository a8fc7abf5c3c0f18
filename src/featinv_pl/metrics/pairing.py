"""Comparison of scores image by image, such as of corrupted and clean images, or of two runs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featinv_pl.metrics.estimates import Estimate, Values
from featinv_pl.metrics.sample_metric import poisson_weights

CHUNK = 4096  # images whose weights are in memory at the same time


class ImageSums:
    """Scores added up by image, which may count several times, such as once for each of its corruptions.

    Args:
        width: How many scores there are.

    Attributes:
        rows: The place of each image, by key.
        sums: (images, width), of the values.
        counts: (images, width), how many values these are; a value that is not finite does not count.
    """

    def __init__(self, width: int) -> None:
        self.rows: dict[str, int] = {}
        self.sums, self.counts = np.zeros((2, 0, width))

    def add(self, keys: Sequence[str], values: NDArray[np.float64]) -> None:
        """Add a test set: the keys of its images, and values (images, width)."""
        places = [self.rows.setdefault(key, len(self.rows)) for key in keys]
        more = [(0, len(self.rows) - len(self.sums)), (0, 0)]
        self.sums, self.counts = np.pad(self.sums, more), np.pad(self.counts, more)
        finite = np.isfinite(values)
        np.add.at(self.sums, places, np.where(finite, values, 0))
        np.add.at(self.counts, places, finite)


def estimates(
    keys: Sequence[str], sums: Values, counts: Values, shares: Sequence[bool], replicates: int
) -> list[Estimate]:
    """Means over images, resampled by image with the weights that `SampleMetric` gives the keys.

    Args:
        keys: One for each image.
        sums: (images, columns).
        counts: (images, columns).
        shares: Which columns are means of zeros and ones.
        replicates: See `SampleMetric`.
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

    Args:
        own: An image may count several times; its reference then counts as often.
        reference: One value for each image and score.
        shares: See `estimates`.
        replicates: See `estimates`.
    """
    keys = [key for key in own.rows if key in reference.rows]
    ours, theirs = ([side.rows[key] for key in keys] for side in (own, reference))
    known = reference.counts[theirs] > 0
    counts = own.counts[ours] * known
    sums = own.sums[ours] * known, reference.sums[theirs] * counts
    above, below = (estimates(keys, side, counts, shares, replicates) for side in sums)
    return [one / other for one, other in zip(above, below, strict=True)]
