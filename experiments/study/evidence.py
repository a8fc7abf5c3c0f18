"""The claims of a study, with intervals over images and seeds: `evidence.md` and `evidence.json` in its folder.

python experiments/study/evidence.py experiments/study/photos.yaml

Of a plan with claims. It names its `scores`, its `test_sets` and its `claims`, each of which is one method minus
another: `spatial` is the own sampler of a run, `spatial.regression` a baseline or a further sampler in it.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from featinv_pl.evaluation.results import CEILING, FLOOR, INVERSION, METRICS, NEIGHBOUR, REGRESSION, read_samples

BASELINES = {
    CEILING: "autoencoder (ceiling)",
    REGRESSION: "regression",
    NEIGHBOUR: "neighbour",
    FLOOR: "another image (floor)",
}
REPLICATES, LEVEL = 10_000, 0.95


@dataclass(frozen=True)
class Scored:
    """A mean over seeds and images, with a 95 % interval where there is one."""

    value: float
    low: float | None
    high: float | None
    images: int
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.low is not None else "")


def bootstrap(values: NDArray[np.float64], replicates: int = REPLICATES) -> tuple[float, float]:
    """The percentile interval of a mean of values (seeds, images), of which both are resampled.

    An image is the same one under every seed, so rows and columns are resampled independently (the pigeonhole
    bootstrap; Owen, arXiv 0712.1111). Of one seed, images alone are.
    """
    random, (seeds, images) = np.random.default_rng(0), values.shape
    counts = random.multinomial(images, np.full(images, 1 / images), replicates) / images
    rows = random.multinomial(seeds, np.full(seeds, 1 / seeds), replicates) / seeds
    means = np.einsum("rs,rs->r", rows, counts @ values.T)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class Study:
    """The scores of all runs of a plan that are done."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.folder, self.runs, self.scores = Path(plan["folder"]), list(plan["runs"]), plan["scores"]
        self.seeds = {
            run: [seed for seed in plan["seeds"] if self._path(run, seed).joinpath(METRICS).is_file()]
            for run in plan["runs"]
        }

    def _path(self, run: str, seed: int) -> Path:
        return self.folder / run / str(seed)

    def methods(self, run: str, test_set: str) -> list[str]:
        """The samplers of a run that have scores, its own first, and its baselines."""
        if not self.seeds[run]:
            return []
        found = json.loads((self._path(run, self.seeds[run][0]) / METRICS).read_text())["scores"].get(test_set, {})
        samplers = [name for name in found if name not in (INVERSION, *BASELINES, "original")]
        baselines = [name for name in BASELINES if name in found]
        return [name for name in (INVERSION, *samplers, *baselines) if name in found]

    def by_image(self, method: str, test_set: str, score: str) -> list[dict[str, float]]:
        """By seed, the scores of images, by key; in a group of test sets, the mean over those that hold the image."""
        run, _, name = method.partition(".")
        column, found = f"{score}.{name}" if name else score, []
        for seed in self.seeds[run]:
            root = self._path(run, seed)
            files = sorted(path.relative_to(root / "samples") for path in (root / "samples").rglob("*.parquet"))
            names = [file.with_suffix("").as_posix() for file in files]
            chosen = [one for one in names if f"{one}/".startswith(f"{test_set}/")]
            values = defaultdict[str, list[float]](list)
            for one in chosen:
                table = read_samples(root, one, [one])
                if column in table.column_names:
                    for key, value in zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True):
                        if value is not None and isfinite(value):
                            values[key].append(value)
            found.append({key: fmean(all_of_it) for key, all_of_it in values.items()})
        return found

    def score(self, method: str, test_set: str, score: str, minus: str | None = None) -> Scored | None:
        """A method's score, or the difference to another's on the same images; None if there is none."""
        parts = [self.by_image(one, test_set, score) for one in (method, minus) if one]
        count = min(len(part) for part in parts)
        by_seed = [part[number] for part in parts for number in range(count)]
        keys = sorted(set.intersection(*(set(values) for values in by_seed))) if by_seed else []
        if not keys:
            return self._distance(method, test_set, score) if minus is None else None
        rows = [np.array([[values[key] for key in keys] for values in part[:count]]) for part in parts]
        values = rows[0] - rows[1] if minus else rows[0]
        return Scored(float(values.mean()), *bootstrap(values), len(keys), count)

    def _distance(self, method: str, test_set: str, score: str) -> Scored | None:
        """A score that images do not have by themselves; its interval is that of the test, of one seed alone."""
        run, _, name = method.partition(".")
        documents = [json.loads((self._path(run, seed) / METRICS).read_text()) for seed in self.seeds[run]]
        found = [each["scores"].get(test_set, {}).get(name or INVERSION, {}).get(score) for each in documents]
        values = [each["value"] for each in found if each]
        images = documents[0]["samples"].get(test_set, 0) if documents else 0
        low, high = (found[0].get(end) for end in ("low", "high")) if len(values) == 1 and found[0] else (None, None)
        return Scored(float(np.mean(values)), low, high, images, len(values)) if values else None


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def tables(study: Study, plan: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A table for each test set and one of the claims, and the same as data."""
    data: dict[str, Any] = {}
    parts = []
    for test_set in plan["test_sets"]:
        rows, shown = [], set[str]()  # the baselines of one run
        for run in study.runs:
            for method in study.methods(run, test_set):
                if method in shown:
                    continue
                shown |= {method} & BASELINES.keys()
                name = run if method == INVERSION else f"{run}.{method}"
                found = {score: study.score(name, test_set, score) for score in study.scores}
                data[f"{test_set}: {name}"] = {score: asdict(one) for score, one in found.items() if one}
                count = max((one.images for one in found.values() if one), default=0)
                seeds = max((one.seeds for one in found.values() if one), default=0)
                title = BASELINES.get(method, run if method == INVERSION else f"{run}, {method}")
                rows.append([title, *(str(one or "") for one in found.values()), str(count), str(seeds)])
        parts.append(f"{test_set}\n\n{markdown(['images from', *study.scores.values(), 'images', 'seeds'], rows)}")
    rows = []
    for claim in plan["claims"]:
        test_set, wanted = claim.get("test_set", plan["source"]), claim.get("scores", study.scores)
        titles = [study.scores.get(score, score) for score in wanted]
        for score, title in zip(wanted, titles, strict=True):
            found_difference = study.score(claim["one"], test_set, score, claim["other"])
            if found_difference:
                what = f"{claim['one']} - {claim['other']}"
                data[f"{test_set}: {what}: {score}"] = asdict(found_difference)
                rows.append([what, test_set, title, str(found_difference), str(found_difference.images)])
    parts.append(f"Differences on the same images\n\n{markdown(['what', 'test set', 'score', 'value', 'n'], rows)}")
    return "\n".join(parts), data


def main(plan_path: str) -> None:
    """Read what the runs of a plan have left, and write its evidence."""
    plan = yaml.safe_load(Path(plan_path).read_text())
    if "claims" not in plan:
        return
    study = Study(plan)
    text, data = tables(study, plan)
    (study.folder / "evidence.md").write_text(text)
    (study.folder / "evidence.json").write_text(json.dumps(data, indent=2) + "\n")
    print(f"{text}\nTables in {study.folder / 'evidence.md'}")


if __name__ == "__main__":
    main(sys.argv[1])
