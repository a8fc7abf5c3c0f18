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
from itertools import product
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import yaml
from numpy.typing import NDArray

from featinv_pl.evaluation.results import (
    CEILING,
    FLOOR,
    INVERSION,
    METRICS,
    NEIGHBOUR,
    ORIGINAL,
    REGRESSION,
    RIDGE,
    Document,
    cell,
    read_document,
    read_samples,
)

BASELINES = {
    CEILING: "autoencoder (ceiling)",
    REGRESSION: "regression",
    RIDGE: "ridge",
    NEIGHBOUR: "neighbour",
    FLOOR: "another image (floor)",
}
REPLICATES, LEVEL = 10_000, 0.95
CALIBRATED = "_calibrated"  # 0 is another image, 1 the autoencoder


@dataclass(frozen=True)
class Scored:
    """A mean over seeds and images, with a 95 % interval where there is one."""

    value: float
    low: float | None
    high: float | None
    images: int
    seeds: int

    def __str__(self) -> str:
        return cell(cast(Any, {name: value for name, value in asdict(self).items() if value is not None}))


def resampled(*values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means (number of values, replicates) of the same values (seeds, images), of which both are resampled.

    An image is the same one under every seed, so rows and columns are resampled independently (the pigeonhole
    bootstrap; Owen, arXiv 0712.1111). Of one seed, images alone are.
    """
    random, (seeds, images) = np.random.default_rng(0), values[0].shape
    counts = random.multinomial(images, np.full(images, 1 / images), REPLICATES) / images
    rows = random.multinomial(seeds, np.full(seeds, 1 / seeds), REPLICATES) / seeds
    return np.stack([np.einsum("rs,rs->r", rows, counts @ one.T) for one in values])


def bootstrap(replicates: NDArray[np.float64]) -> tuple[float, float]:
    """The percentile interval."""
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class Study:
    """The scores of all runs of a plan that are done."""

    def __init__(self, plan: Mapping[str, Any]) -> None:
        self.folder, self.scores = Path(plan["folder"]), plan["scores"]
        self.documents: dict[str, dict[int, Document]] = {}  # by run and seed
        for run, seed in product(plan["runs"], plan["seeds"]):
            done = self.documents.setdefault(run, {})
            if (path := self.folder / run / str(seed) / METRICS).is_file():
                done[seed] = read_document(path, "evidence")

    def methods(self, run: str, test_set: str) -> list[str]:
        """The samplers of a run that have scores, its own first, and its baselines."""
        found = next(iter(self.documents[run].values()), {"scores": {}})["scores"].get(test_set, {})
        samplers = [name for name in found if name not in (INVERSION, ORIGINAL, *BASELINES)]
        return [name for name in (INVERSION, *samplers, *BASELINES) if name in found]

    def by_image(self, method: str, test_set: str, score: str) -> dict[int, dict[str, float]]:
        """By seed, the scores of images, by key; in a group of test sets, the mean over those that hold the image."""
        run, _, name = method.partition(".")
        column, found = f"{score}.{name}" if name else score, {}
        for seed, document in self.documents[run].items():
            values = defaultdict[str, list[float]](list)
            if test_set in document["samples"]:
                rows = read_samples(self.folder / run / str(seed), test_set, document["samples"])
                if column in rows.column_names:
                    for key, value in zip(rows["key"].to_pylist(), rows[column].to_pylist(), strict=True):
                        if value is not None and isfinite(value):
                            values[key].append(value)
            found[seed] = {key: fmean(each) for key, each in values.items()}
        return found

    def score(self, method: str, test_set: str, score: str, minus: str | None = None) -> Scored | None:
        """A method's score, or its difference to that of another, of the same images and seeds."""
        run, plain = method.partition(".")[0], score.removesuffix(CALIBRATED)
        ends = (f"{run}.{FLOOR}", f"{run}.{CEILING}") if plain != score else ()
        parts = [self.by_image(one, test_set, plain) for one in (method, *((minus,) if minus else ()), *ends)]
        seeds = [seed for seed in parts[0] if all(part.get(seed) for part in parts)]
        keys = sorted(set.intersection(*({*part[seed]} for part in parts for seed in seeds))) if seeds else []
        if not keys:
            return None if minus else self._of_sets(method, test_set, score)
        values = [np.array([[part[seed][key] for key in keys] for seed in seeds]) for part in parts]
        means, many = np.stack(values).mean((1, 2)), resampled(*values)
        found, replicates = (_score(one, bool(minus), bool(ends)) for one in (means, many))
        return Scored(float(found), *bootstrap(replicates), len(keys), len(seeds))

    def _of_sets(self, method: str, test_set: str, score: str) -> Scored | None:
        """A score that single images do not have; of one seed, with the interval of its test."""
        run, _, name = method.partition(".")
        tested = [one for one in self.documents[run].values() if test_set in one["samples"]]
        found = [one["scores"][test_set].get(name or INVERSION, {}).get(score) for one in tested]
        scores = [one for one in found if one]
        if not scores:
            return None
        one = cast(dict[str, float], scores[0]) if len(scores) == 1 else {}
        mean = fmean(each["value"] for each in scores)
        return Scored(mean, one.get("low"), one.get("high"), tested[0]["samples"][test_set], len(scores))


def _score(means: NDArray[np.float64], less: bool, calibrated: bool) -> NDArray[np.float64]:
    """Of means: the own, perhaps that of another method, which is subtracted, and perhaps floor and ceiling."""
    own, *others = means
    if calibrated:
        floor, ceiling = others[-2:]
        return np.asarray((own - (others[0] if less else floor)) / (ceiling - floor))
    return np.asarray(own - others[0] if less else own)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def scored(study: Study, test_set: str) -> dict[str, dict[str, Scored]]:
    """The scores of every method, by its title; baselines are those of the first run that has them."""
    found: dict[str, dict[str, Scored]] = {}
    for run in study.documents:
        for method in study.methods(run, test_set):
            own = method == INVERSION
            title = BASELINES.get(method, run if own else f"{run}, {method}")
            if title not in found:
                scores = {one: study.score(run if own else f"{run}.{method}", test_set, one) for one in study.scores}
                found[title] = {one: value for one, value in scores.items() if value}
    return found


def differences(study: Study, claim: Mapping[str, str], test_set: str) -> dict[str, Scored]:
    """What a claim says of each score that images have."""
    found = {one: study.score(claim["one"], test_set, one, claim["other"]) for one in study.scores}
    return {one: value for one, value in found.items() if value}


def table(study: Study, first: str, found: Mapping[str, Mapping[str, Scored]]) -> str:
    """One in Markdown, with a line for each of the found."""
    rows = []
    for title, scores in found.items():
        counts = next(iter(scores.values()))
        cells = [str(scores.get(one, "")) for one in study.scores]
        rows.append([title, *cells, str(counts.images), str(counts.seeds)])
    return markdown([first, *study.scores.values(), "images", "seeds"], rows)


def main(plan_path: str) -> None:
    """Read what the runs of a plan have left, and write its evidence."""
    plan = yaml.safe_load(Path(plan_path).read_text())
    if "claims" not in plan:
        return
    study = Study(plan)
    by_set = {test_set: scored(study, test_set) for test_set in plan["test_sets"]}
    claims = {f"{one['one']} - {one['other']}": differences(study, one, plan["source"]) for one in plan["claims"]}
    found = {test_set: scores for test_set, scores in by_set.items() if scores}
    parts = [f"{test_set}\n\n{table(study, 'images from', scores)}" for test_set, scores in found.items()]
    said = {what: scores for what, scores in claims.items() if scores}
    parts.append(f"Differences on the same images of {plan['source']}\n\n{table(study, 'what', said)}")
    text, data = "\n".join(parts), {**found, "differences": said}
    (study.folder / "evidence.md").write_text(text)
    (study.folder / "evidence.json").write_text(json.dumps(data, default=asdict, indent=2) + "\n")
    print(f"{text}\nTables in {study.folder / 'evidence.md'}")


if __name__ == "__main__":
    main(sys.argv[1])
