"""Scores that follow from others, the files and tables that show them, and differences between runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from featinv_pl.evaluation.report import differences
from featinv_pl.evaluation.results import METRICS, SCORES, Name, Results, aligned, by_name, write_samples
from featinv_pl.metrics.estimates import Estimate


def estimate(*values: float) -> Estimate:
    return Estimate(np.array(values))


def results(ceiling: float = 0.9) -> Results:
    rng = np.random.default_rng(0)
    found = Results(counts={"clean": 50, "c/fog/1": 50, "c/fog": 50, "c": 50})
    for test_set, value in (("clean", 0.8), ("c/fog/1", 0.4), ("c/fog", 0.4), ("c", 0.4)):
        for method, mean in (("inversion", value), ("floor", 0.3), ("ceiling", ceiling)):
            found.values[Name(test_set, "cosine", method)] = estimate(mean, *rng.normal(mean, 0.01, 1000))
    found.values[Name("clean", "fd_tiny")] = estimate(np.nan)
    found.derive()
    return found


def test_calibrated_cosines_and_differences_have_intervals() -> None:
    scores = results().scores
    calibrated = scores[Name("clean", "cosine_calibrated")]
    assert calibrated["value"] == pytest.approx((0.8 - 0.3) / (0.9 - 0.3))
    assert calibrated["low"] < calibrated["value"] < calibrated["high"]
    assert calibrated["high"] - calibrated["low"] == pytest.approx(4 * 0.01 / 0.6, rel=0.5)
    difference = scores[Name("clean", "cosine_difference", "floor")]
    assert difference["value"] == pytest.approx(0.8 - 0.3)
    assert difference["high"] - difference["low"] == pytest.approx(4 * 0.01 * 2**0.5, rel=0.2)
    assert not [name for name in results(ceiling=0.2).scores if "calibrated" in name.score]


def test_every_method_is_calibrated_and_in_the_table() -> None:
    found = results()
    for method, value in (("refined", 0.85), ("neighbour", 0.7)):
        found.values[Name("clean", "cosine", method)] = estimate(value)
    found.derive()
    for method, value in {"inversion": 0.5 / 0.6, "refined": 0.55 / 0.6, "neighbour": 0.4 / 0.6}.items():
        assert found.scores[Name("clean", "cosine_calibrated", method)]["value"] == pytest.approx(value, abs=0.01)
    assert b"clean,refined,cosine,0.85," in found.files()[SCORES]
    lines = aligned(found.table()).splitlines()
    assert lines[0].split() == ["test", "set", "n", "method", "cosine", "cosine_calibrated", "fd_tiny"]
    assert "0.800 [" in lines[2]
    narrow = aligned(found.table(), 60).splitlines()  # without intervals, which need half of the width
    assert narrow[0].split()[-2:] == ["cosine", "cosine_calibrated"]
    assert narrow[2].split()[:4] == ["clean", "50", "reconstruction", "0.800"]
    assert narrow[-1] == "The window is too narrow for: fd_tiny."
    assert max(map(len, narrow)) <= 60
    order = [("clean", method) for method in ("reconstruction", "autoencoder", "neighbour", "floor", "refined")]
    order += [("c", method) for method in ("reconstruction", "autoencoder", "floor")]  # complete data sets only
    assert [tuple(line.split()[:3:2]) for line in lines[2:]] == order


@pytest.mark.parametrize("method", ["pooled", "calibrated", "1"])
def test_a_sampler_may_be_called_as_a_score_ends(method: str) -> None:
    found = results()
    found.values[Name("clean", "cosine", method)] = estimate(0.123)
    found.values[Name("clean", f"cosine_{method}")] = estimate(0.456)
    document = json.loads(found.files()[METRICS])
    assert "fd_tiny" not in document["scores"]["clean"]["inversion"]  # NaN
    assert document["scores"]["clean"][method]["cosine"] == {"value": 0.123}
    assert document["scores"]["clean"]["inversion"][f"cosine_{method}"] == {"value": 0.456}
    assert by_name(document) == found.scores
    names = [str(name) for name in found.scores]
    assert len(set(names)) == len(names)
    assert f"clean/cosine.{method}" in names
    assert next(row[3] for row in found.table() if row[2] == method) == "0.123"


def test_runs_are_compared_on_the_images_of_both() -> None:
    def write(folder: str, test_set: str, keys: list[str], cosines: list[float], agreed: list[float]) -> None:
        write_samples(Path(folder), test_set, {"key": keys, "cosine": cosines, "agreement@1": agreed})

    worse, keys, cosines = np.array([0.0, 0.1, 0.2, 0.3, 0.15, 0.05]), list("abcdef"), np.linspace(0.1, 0.9, 6)
    for test_set in ("c/fog/1", "c/fog/2"):
        write("one", test_set, keys, cosines.tolist(), [1, 1, 1, 1, 0, 1])
        write("other", test_set, [*keys[::-1], "x"], [*(cosines - worse)[::-1], -1.0], [1, 1, 0, 1, 1, 0, 0])
    found = differences(Path("one"), Path("other"), ["c/fog/1", "c/fog/2"])
    assert found["cosine"].values[0] == pytest.approx(worse.mean())
    assert found["agreement@1"].values[0] == pytest.approx((5 - 4) / 6)
    assert found["cosine"].count == 12
    low, high = found["cosine"].interval or (np.nan, np.nan)
    # Six images, whatever the number of their corruptions; unpaired, the interval would be far wider.
    assert high - low == pytest.approx(2 * 1.96 * worse.std() / 6**0.5, rel=0.3)
