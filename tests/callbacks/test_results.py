"""What follows from scores, and how they are shown."""

import json

import numpy as np
import pytest

from featinv_pl.callbacks.results import METRICS, SCORES, Name, Results, aligned


def results(ceiling: float = 0.9) -> Results:
    rng = np.random.default_rng(0)

    def around(value: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.concatenate([[value], value + 0.01 * rng.standard_normal(1000)])

    found = Results(counts={"clean": 50, "c/fog/1": 50, "c/fog": 50, "c": 50})
    for source, value in (("clean", 0.8), ("c/fog/1", 0.4), ("c/fog", 0.4), ("c", 0.4)):
        found.values[Name(source, "cosine")] = around(value)
        found.values[Name(source, "cosine", "_floor")] = around(0.3)
        found.values[Name(source, "cosine", "_ceiling")] = around(ceiling)
    found.values[Name("clean", "fd_tiny")] = np.array([np.nan])
    found.derive("clean")
    return found


def test_calibrated_and_relative_are_ratios_with_intervals() -> None:
    found = results()
    assert found.scores["clean/cosine_calibrated"] == pytest.approx((0.8 - 0.3) / (0.9 - 0.3))
    low, high = found.intervals["clean/cosine_calibrated"]
    assert low < found.scores["clean/cosine_calibrated"] < high
    assert high - low == pytest.approx(4 * 0.01 / 0.6, rel=0.5)
    # Groups alone are compared with the clean source.
    relative = {name: value for name, value in found.scores.items() if "relative" in name}
    assert relative == pytest.approx({"c/cosine_relative": 0.5, "c/fog/cosine_relative": 0.5})


def test_every_arm_is_calibrated_and_in_the_table() -> None:
    found = results()
    for arm, value in (("_refined", 0.85), ("_neighbour", 0.7)):
        found.values[Name("clean", "cosine", arm)] = np.array([value])
    found.derive("clean")
    assert found.scores["clean/cosine_calibrated_refined"] == pytest.approx((0.85 - 0.3) / (0.9 - 0.3), abs=0.01)
    assert found.scores["clean/cosine_calibrated_neighbour"] == pytest.approx((0.7 - 0.3) / (0.9 - 0.3), abs=0.01)
    arms = [line.split()[2] for line in aligned(found.table()).splitlines()[2:] if line.startswith("clean")]
    assert arms == ["inversion", "autoencoder", "neighbour", "floor", "refined"]
    assert b"clean,cosine,refined,0.85," in found.files()[SCORES]
    assert not [name for name in found.scores if "calibrated_floor" in name or "calibrated_ceiling" in name]


def test_calibrated_needs_a_ceiling_above_the_floor() -> None:
    assert not [name for name in results(ceiling=0.2).scores if "calibrated" in name]


def test_what_is_not_a_number_is_left_out() -> None:
    document = json.loads(results().files()[METRICS])
    assert "clean/fd_tiny" not in document["scores"]
    assert set(document) == {"samples", "scores", "intervals", "notes"}


def test_replicates_that_are_not_finite_do_not_spoil_an_interval() -> None:
    found = Results(counts={"a": 1}, values={Name("a", "label@1"): np.array([0.5, 0.4, 0.6, np.nan, np.inf])})
    assert found.intervals["a/label@1"] == pytest.approx((0.4075, 0.5925), abs=5e-3)


def test_the_table_shows_whole_data_sets() -> None:
    lines = aligned(results().table()).splitlines()
    assert lines[0].split() == ["source", "n", "arm", "cosine", "cosine_calibrated", "fd_tiny"]
    assert [line.split()[:3] for line in lines[2:]] == [
        [source, "50", arm] for source in ("clean", "c") for arm in ("inversion", "autoencoder", "floor")
    ]
    assert "0.800 [" in lines[2]
