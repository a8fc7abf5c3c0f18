"""Scores that follow from others, and the files and tables that show them."""

import json

import numpy as np
import pytest

from featinv_pl.evaluation.results import METRICS, SCORES, Name, Results, Score, aligned, by_name
from featinv_pl.metrics.estimates import Estimate


def results(ceiling: float = 0.9) -> Results:
    rng = np.random.default_rng(0)

    def around(value: float) -> Estimate:
        return Estimate(np.concatenate([[value], value + 0.01 * rng.standard_normal(1000)]))

    found = Results(counts={"clean": 50, "c/fog/1": 50, "c/fog": 50, "c": 50})
    for test_set, value in (("clean", 0.8), ("c/fog/1", 0.4), ("c/fog", 0.4), ("c", 0.4)):
        found.values[Name(test_set, "cosine")] = around(value)
        found.values[Name(test_set, "cosine", "floor")] = around(0.3)
        found.values[Name(test_set, "cosine", "ceiling")] = around(ceiling)
    found.values[Name("clean", "fd_tiny")] = Estimate(np.array([np.nan]))
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
        found.values[Name("clean", "cosine", method)] = Estimate(np.array([value]))
    found.derive()
    calibrated = {
        name.method: score["value"]
        for name, score in found.scores.items()
        if (name.test_set, name.score) == ("clean", "cosine_calibrated")
    }
    expected = {"inversion": 0.5 / 0.6, "refined": 0.55 / 0.6, "neighbour": 0.4 / 0.6}
    assert calibrated == pytest.approx(expected, abs=0.01)
    methods = [line.split()[2] for line in aligned(found.table()).splitlines()[2:] if line.startswith("clean")]
    assert methods == ["reconstruction", "autoencoder", "neighbour", "floor", "refined"]
    assert b"clean,refined,cosine,0.85," in found.files()[SCORES]


@pytest.mark.parametrize("method", ["pooled", "calibrated", "1"])
def test_a_sampler_may_be_called_as_a_score_ends(method: str) -> None:
    found = results()
    before = found.scores
    found.values[Name("clean", "cosine", method)] = Estimate(np.array([0.123]))
    found.values[Name("clean", f"cosine_{method}")] = Estimate(np.array([0.456]))
    document = json.loads(found.files()[METRICS])
    assert document["scores"]["clean"][method]["cosine"] == {"value": 0.123}
    assert document["scores"]["clean"]["inversion"][f"cosine_{method}"] == {"value": 0.456}
    assert by_name(document) == found.scores
    names = [str(name) for name in found.scores]
    assert len(set(names)) == len(names) >= len(before) + 1
    assert f"clean/cosine.{method}" in names
    row = next(row for row in found.table() if row[2] == method)
    assert row[3] == "0.123"


def test_nan_and_inf_are_left_out() -> None:
    document = json.loads(results().files()[METRICS])
    assert set(document) == {"samples", "scores", "notes", "provenance"}
    assert list(document["scores"]["clean"]) == ["inversion", "ceiling", "floor"]
    assert "fd_tiny" not in document["scores"]["clean"]["inversion"]
    found = Results(counts={"a": 1}, values={Name("a", "label@1"): Estimate(np.array([0.5, 0.4, 0.6, np.nan, np.inf]))})
    expected: Score = {"value": 0.5, "low": 0.4075, "high": 0.5925}
    assert found.scores[Name("a", "label@1")] == pytest.approx(expected, abs=5e-3)


def test_the_table_shows_complete_data_sets() -> None:
    lines = aligned(results().table()).splitlines()
    assert lines[0].split() == ["test", "set", "n", "method", "cosine", "cosine_calibrated", "fd_tiny"]
    assert [line.split()[:3] for line in lines[2:]] == [
        [test_set, "50", method] for test_set in ("clean", "c") for method in ("reconstruction", "autoencoder", "floor")
    ]
    assert "0.800 [" in lines[2]
