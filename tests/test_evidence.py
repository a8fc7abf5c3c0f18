"""The tables of a study with claims."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet
from scipy import stats

EVIDENCE = runpy.run_path(str(Path(__file__).parents[1] / "experiments/study/evidence.py"))
IMAGES = 60
PROVENANCE = {
    "command": "test",
    "date": "2026-01-01T00:00:00+00:00",
    "checkpoint": {"path": None, "step": 1, "digest": "0"},
    **{name: {} for name in ("model", "sampling", "code", "shards")},
}


@pytest.fixture
def plan(rng: np.random.Generator) -> dict[str, Any]:
    """Two runs of two seeds on a test set and on a group of two, of which the second lacks an image."""
    for run, higher in (("spatial", 0.3), ("pooled", 0.0)):
        for seed in (0, 1):
            root = Path("study", run, str(seed))
            for test_set, count in (("test", IMAGES), ("worse/fog/3", IMAGES), ("worse/snow/3", IMAGES - 1)):
                values = rng.uniform(0.2, 0.6, count)
                table = {
                    "key": [f"{number:03}" for number in range(count)],
                    "cosine": values + higher + 0.01 * seed,
                    "cosine.floor": values / 2,
                    "cosine.ceiling": 1 - values / 10,
                }
                path = root / "samples" / f"{test_set}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                parquet.write_table(pyarrow.table(table), path)
            scores = {"inversion": {"fd": {"value": 10.0 + seed}, "cosine": {"value": 0}}, "floor": {}}
            samples = dict.fromkeys(("test", "worse", "worse/fog/3", "worse/snow/3"), IMAGES)
            document = {
                "samples": samples,
                "scores": {"test": scores, "worse": scores},
                "notes": [],
                "provenance": PROVENANCE,
            }
            (root / "metrics.json").write_text(json.dumps(document))
    return {
        "folder": "study",
        "source": "test",
        "seeds": [0, 1, 2],  # the last is not done
        "runs": {"spatial": {}, "pooled": {}},
        "scores": {"cosine": "map cosine", "cosine_calibrated": "calibrated cosine", "fd": "FD"},
        "test_sets": ["test", "worse"],
        "claims": [{"one": "spatial", "other": "pooled"}, {"one": "spatial", "other": "spatial.floor"}],
    }


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def column(run: str, seed: int, test_set: str, name: str) -> Any:
    table = parquet.read_table(f"study/{run}/{seed}/samples/{test_set}.parquet")
    return np.array(table[name])


def test_a_difference_is_that_of_the_same_images(plan: dict[str, Any]) -> None:
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    EVIDENCE["main"]("plan.yaml")
    found = json.loads(Path("study/evidence.json").read_text())

    own, other = ([column(run, seed, "test", "cosine") for seed in (0, 1)] for run in ("spatial", "pooled"))
    difference = found["differences"]["spatial - pooled"]["cosine"]
    assert difference["value"] == pytest.approx(np.mean(own) - np.mean(other))
    assert (difference["images"], difference["seeds"]) == (IMAGES, 2)
    assert difference["low"] < difference["value"] < difference["high"]

    floors, ceilings = (
        [column("spatial", seed, "test", f"cosine.{one}") for seed in (0, 1)] for one in ("floor", "ceiling")
    )
    calibrated = found["test"]["spatial"]["cosine_calibrated"]
    scale = np.mean(np.subtract(ceilings, floors))
    assert calibrated["value"] == pytest.approx((np.mean(own) - np.mean(floors)) / scale)
    assert calibrated["low"] < calibrated["value"] < calibrated["high"]
    less = found["differences"]["spatial - pooled"]["cosine_calibrated"]["value"]
    assert less == pytest.approx(difference["value"] / scale)
    sets = {"value": 10.5, "low": None, "high": None, "images": IMAGES, "seeds": 2}
    assert found["test"]["spatial"]["fd"] == sets

    # The corruptions of an image are one image, and the one that a corruption lacks has fewer.
    fog, snow = ([column("spatial", seed, f"worse/{one}/3", "cosine") for seed in (0, 1)] for one in ("fog", "snow"))
    by_image = [(np.append(few, many[-1]) + many) / 2 for few, many in zip(snow, fog, strict=True)]
    assert found["worse"]["spatial"]["cosine"]["value"] == pytest.approx(np.mean(by_image))

    text = Path("study/evidence.md").read_text()
    assert text.count("| another image (floor) |") == 2  # of one run alone, in two tables
    assert f"| spatial - pooled | {difference['value']:.3f} [{difference['low']:.3f}, " in text


def test_runs_are_compared_seed_by_seed(plan: dict[str, Any]) -> None:
    Path("study/pooled/0/metrics.json").unlink()  # it is not done
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    EVIDENCE["main"]("plan.yaml")
    difference = json.loads(Path("study/evidence.json").read_text())["differences"]["spatial - pooled"]["cosine"]
    own, other = (column(run, 1, "test", "cosine") for run in ("spatial", "pooled"))
    assert difference["value"] == pytest.approx(np.mean(own) - np.mean(other))
    assert difference["seeds"] == 1


def test_intervals_are_those_of_a_bootstrap(rng: np.random.Generator) -> None:
    values = rng.normal(0.5, 0.2, (1, 200))
    expected = stats.bootstrap(values, np.mean, method="percentile", random_state=0).confidence_interval
    assert EVIDENCE["bootstrap"](EVIDENCE["resampled"](values)[0]) == pytest.approx(tuple(expected), abs=2e-3)
    # Seeds that differ by more than images do make it wider, and images that do not differ leave the seeds alone.
    apart = values + np.array([[0.0], [1.0]])
    low, high = EVIDENCE["bootstrap"](EVIDENCE["resampled"](apart)[0])
    assert high - low > 0.9
    assert EVIDENCE["bootstrap"](EVIDENCE["resampled"](np.full((3, 50), 0.25))[0]) == pytest.approx((0.25, 0.25))


def test_a_plan_without_claims_has_no_evidence(plan: dict[str, Any]) -> None:
    del plan["claims"]
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    EVIDENCE["main"]("plan.yaml")
    assert not Path("study/evidence.md").exists()
