"""Differences between two tested inverters, paired by image."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featinv_pl.evaluation.results import read_samples
from featinv_pl.metrics.estimates import Estimate
from featinv_pl.metrics.pairing import ImageSums, estimates

SCORES = {"cosine": False, "agreement@1": True}
"""The scores that are compared, and whether each is a share."""
REPLICATES = 1000


def differences(one: Path, other: Path, test_sets: Iterable[str]) -> dict[str, Estimate]:
    """The scores of one inverter minus those of another.

    Images are matched by test set and key, and resampled by key: the corruptions of one image are one image.

    Args:
        one: The folder of a run, as `test` leaves it.
        other: That of another.
        test_sets: Test sets of both, taken together.
    """
    sums = ImageSums(2 * len(SCORES))
    for test_set in test_sets:
        (keys, ours), (others, theirs) = (_samples(folder, test_set) for folder in (one, other))
        common, first, second = np.intersect1d(keys, others, assume_unique=True, return_indices=True)
        values = np.stack([ours[first], theirs[second]])
        values[:, ~np.isfinite(values).all(0)] = np.nan
        sums.add(common.tolist(), np.concatenate([*values], axis=1))
    found = estimates(list(sums.rows), sums.sums, sums.counts, [*SCORES.values()] * 2, REPLICATES)
    pairs = zip(SCORES, found[: len(SCORES)], found[len(SCORES) :], strict=True)
    return {score: own - theirs for score, own, theirs in pairs}


def _samples(folder: Path, test_set: str) -> tuple[NDArray[np.str_], NDArray[np.float64]]:
    """Keys, and (images, scores)."""
    table = read_samples(folder, test_set, [test_set])
    missing = np.full(len(table), np.nan)
    columns = [table[name].to_numpy().astype(np.float64) if name in table.column_names else missing for name in SCORES]
    return np.array(table["key"].to_pylist()), np.stack(columns, axis=1)
