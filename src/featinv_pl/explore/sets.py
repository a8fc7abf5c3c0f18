"""Sets of pictures: where they are found, means over them with intervals, paired tests."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import permutation_test

from featinv_pl.data.images.layouts import labelled_images
from featinv_pl.data.shards.manifest import MANIFEST
from featinv_pl.errors import UserError, renamed
from featinv_pl.explore.exploration import read_samples
from featinv_pl.metrics.estimates import Estimate, estimates
from featinv_pl.pages.page import open_picture

READ = 2000  # pictures of a shard set at most, of which those of a class are taken
REPLICATES, PERMUTATIONS = 1000, 9999
Values = NDArray[np.float64]
Pictures = Sequence[tuple[str, Callable[[], Image.Image]]]
"""Names of pictures, and what opens each."""


class Difference(NamedTuple):
    """A paired difference, and the p-value of a test whether it is 0."""

    estimate: Estimate
    p: float


def find_pictures(folder: Path, num_images: int, label: str | None) -> Pictures:
    """Pictures of a folder or shard set, evenly spaced over it; with a `label`, of that label or class folder alone.

    Raises:
        UserError: There are none.
    """
    found: Pictures
    if (folder / MANIFEST).is_file():
        samples = read_samples([folder], READ, "`over`")
        with renamed("between", "label"):
            chosen = range(len(samples.keys)) if label is None else samples.of_class(label).nonzero().flatten().tolist()
        found = [(samples.keys[index], partial(samples.picture, index)) for index in chosen]
    else:
        with renamed("data", "over"):
            images = labelled_images(folder)
        if label is not None and label not in {name for _, name in images}:
            raise UserError(f"`label`: '{folder}' has no class folder '{label}'. Give the name of one.")
        paths = [path for path, name in images if label in (None, name)]
        found = [(path, partial(open_picture, folder / path, "`over`")) for path in paths]
    places = np.linspace(0, len(found) - 1, min(num_images, len(found))).round().astype(int)
    return [found[place] for place in places.tolist()]


def means(keys: Sequence[str], values: Values, shares: bool) -> list[Estimate]:
    """The means of columns (n, columns) over n units, with intervals; `shares` says that values are zeros and ones."""
    return estimates(keys, values, np.ones_like(values), [shares] * values.shape[1], REPLICATES)


def difference(keys: Sequence[str], one: Values, two: Values, shares: bool) -> Difference:
    """The mean difference of paired values (n,), tested by exchanging the values of pairs at random, two-sided."""
    first, second = means(keys, np.stack([one, two], axis=1), shares)
    exact = first - second if shares else means(keys, (one - two)[:, None], False)[0]
    test = permutation_test(
        (one, two), _mean_difference, permutation_type="samples", n_resamples=PERMUTATIONS, vectorized=True, rng=0
    )
    return Difference(exact, float(test.pvalue))


def _mean_difference(one: Values, two: Values, axis: int) -> Values:
    return np.asarray((one - two).mean(axis=axis))


def cell(estimate: Estimate) -> str:
    """A value with its interval."""
    low, high = limits(estimate)
    return f"{estimate.values[0]:.3f} [{low:.3f}, {high:.3f}]"


def limits(estimate: Estimate) -> tuple[float, float]:
    """The 95 % interval."""
    return estimate.interval or (float(estimate.values[0]), float(estimate.values[0]))


def numbers(estimate: Estimate) -> dict[str, float]:
    """A value with its interval, for JSON."""
    low, high = limits(estimate)
    return {"value": float(estimate.values[0]), "low": low, "high": high}


def shown_p(p: float) -> str:
    """A p-value, as far as the permutations can tell."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
