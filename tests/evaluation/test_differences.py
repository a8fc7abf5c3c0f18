"""Differences between runs, matched image by image."""

from pathlib import Path

import numpy as np
import pytest

from featinv_pl.evaluation.differences import differences
from featinv_pl.evaluation.results import samples_file, samples_path

WORSE = np.array([0.0, 0.1, 0.2, 0.3, 0.15, 0.05])


def write(run: str, source: str, keys: list[str], cosines: list[float], agreed: list[float]) -> None:
    path = samples_path(Path(run), source)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(samples_file({"key": keys, "cosine": cosines, "agreement@1": agreed}))


def test_runs_are_compared_on_the_images_of_both() -> None:
    keys, cosines = list("abcdef"), np.array([0.9, 0.2, 0.5, 0.8, 0.1, 0.7])
    for source in ("c/fog/1", "c/fog/2"):
        write("one", source, keys, cosines.tolist(), [1, 1, 1, 1, 0, 1])
        write("other", source, [*keys[::-1], "x"], [*(cosines - WORSE)[::-1], -1.0], [1, 1, 0, 1, 1, 0, 0])
    found = differences(Path("one"), Path("other"), ["c/fog/1", "c/fog/2"])
    assert found["cosine"].values[0] == pytest.approx(WORSE.mean())
    assert found["agreement@1"].values[0] == pytest.approx((5 - 4) / 6)
    assert found["cosine"].count == 12
    low, high = found["cosine"].interval or (np.nan, np.nan)
    # Six images, whatever the number of their corruptions; unpaired, the interval would be far wider.
    assert high - low == pytest.approx(2 * 1.96 * WORSE.std() / 6**0.5, rel=0.3)
