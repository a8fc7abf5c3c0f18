"""Compare what the layers of a study keep: `layers.md`, `layers.json` and `layers.png` in its folder.

python experiments/study/layers.py experiments/study/layers.yaml

Fidelity is comparable between layers when it is calibrated: 0 is another image, 1 the autoencoder alone. Diversity is
compared at equal fidelity: samples of a map count from a calibrated cosine on, so that a layer does not look invariant
where its inverter is only inexact.
"""

import json
import sys
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from table import interval
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.evaluation.results import CEILING, FLOOR, INVERSION, cell, label
from featinv_pl.explore.exploration import read_samples, reconstruct_maps
from featinv_pl.inverter.pipeline import FeatInvPipeline

COLUMNS = {
    "calibrated cosine": (INVERSION, "cosine_calibrated"),
    "held-out: calibrated cosine": (INVERSION, "judge_cosine_calibrated"),
    "agreement@1": (INVERSION, "agreement@1"),
    "PSNR": (INVERSION, "psnr"),
}
PANELS = {
    "calibrated cosine": {
        "of the layer's map": (INVERSION, "cosine_calibrated"),
        "of the held-out classifier's": (INVERSION, "judge_cosine_calibrated"),
    },
    "agreement@1": {label(one): (one, "agreement@1") for one in (INVERSION, CEILING)},
    "PSNR (dB)": {label(one): (one, "psnr") for one in (INVERSION, CEILING)},
}
GRID = np.array([-np.inf, *np.linspace(0, 1, 101)])  # of calibrated cosines; from the first one on are all samples
REPLICATES = 1000
SHORT = {"images": 2, "samples": 2}
Scores = Mapping[str, list[Any]]  # by run, those of each seed that is done
Values = NDArray[np.float64]


def read_scores(plan: Mapping[str, Any]) -> Scores:
    """The scores of the study's test set, by run."""
    found = {}
    for run in plan["runs"]:
        paths = [Path(plan["folder"], run, str(seed), "metrics.json") for seed in plan["seeds"]]
        found[run] = [json.loads(path.read_text())["scores"][plan["source"]] for path in paths if path.is_file()]
    return {run: scores for run, scores in found.items() if scores}


def values(scores: list[Any], method: str, score: str) -> list[float]:
    """A score for each seed that has it."""
    return [one[method][score]["value"] for one in scores if score in one.get(method, {})]


def said(scores: list[Any], method: str, score: str) -> str:
    """A mean over seeds with its 95 % interval (Student's t); of one seed the score, with its interval over images."""
    found = values(scores, method, score)
    return cell(scores[0][method][score]) if len(found) == 1 else interval(found)


def diversities(plan: Mapping[str, Any], run: str, scores: Any, short: bool) -> Values:
    """What `open_at` says of samples from the maps of test images, by the inverter of the first seed."""
    folder, asked = Path(plan["folder"], run, str(plan["seeds"][0])), SHORT if short else plan["diversity"]
    shards = yaml.safe_load((folder / "fit.yaml").read_text())["data"]["init_args"]["test"][plan["source"]]
    pipeline = FeatInvPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    target = read_samples([Path(shards)], asked["images"], "SHARDS").features.float()
    found = reconstruct_maps(pipeline, [*target], asked["samples"])
    cosines = cosine_similarity(found["features"], target[:, None], dim=2).mean((2, 3))
    floor, ceiling = (scores[method]["cosine"]["value"] for method in (FLOOR, CEILING))
    return open_at((cosines - floor) / (ceiling - floor), found["images"])


def open_at(reached: Tensor, images: Tensor) -> Values:
    """How far samples differ that reach each fidelity of `GRID`: (S, 102).

    For each of S images, the root mean square difference of pixels in [0, 1] over all pairs of such samples; NaN where
    there are fewer than two.

    Args:
        reached: Calibrated cosines (S, n) of samples.
        images: The samples (S, n, 3, H, W) in [-1, 1].
    """
    flat = images.flatten(2).double() / 2
    apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[-1] ** 0.5
    rows = np.full((len(reached), len(GRID)), np.nan)
    for image, place in np.ndindex(*rows.shape):
        chosen = reached[image] >= GRID[place]
        if (count := int(chosen.sum())) > 1:
            rows[image, place] = apart[image][chosen][:, chosen].sum() / (count * (count - 1))
    return rows


def mean_of(rows: Values) -> tuple[float, float, float]:
    """A mean over images (S,) and its 95 % interval, of a bootstrap."""
    drawn = np.random.default_rng(0).integers(len(rows), size=(REPLICATES, len(rows)))
    low, high = np.percentile(rows[drawn].mean(1), [2.5, 97.5])
    return float(rows.mean()), float(low), float(high)


def equal_fidelity(found: Mapping[str, Values]) -> tuple[int, NDArray[np.bool_]]:
    """The highest fidelity, by its place in `GRID`, that half of the images reach twice in each layer, and which do."""
    both = np.all([np.isfinite(rows) for rows in found.values()], axis=0)
    place = int(np.flatnonzero(both.mean(0) >= 0.5).max(initial=0))
    return place, both[:, place]


def markdown(scores: Scores, found: Mapping[str, Values]) -> str:
    """The table of scores, and of diversity at equal fidelity with 95 % intervals over images."""
    place, counted = equal_fidelity(found)
    last = [*found][-1]
    open_to = ["diversity of all samples", f"from {GRID[place]:.2f} on", f"less that of {last}"]
    head = ["layer", *COLUMNS, *open_to, "seeds"]
    table = [head, ["---"] * len(head)]
    for run, seeds in scores.items():
        own, other = found[run][counted, place], found[last][counted, place]
        cells = [said(seeds, *one) for one in COLUMNS.values()]
        for rows in (found[run][:, 0], own, own - other):
            cells += ["{:.3f} [{:.3f}, {:.3f}]".format(*mean_of(rows)) if len(rows) else ""]
        table += [[run, *cells, str(len(seeds))]]
    lines = "".join(f"| {' | '.join(line)} |\n" for line in table)
    return f"{lines}\nDiversity from a fidelity on: {counted.sum()} of {len(counted)} images, the first seed.\n"


def plot(scores: Scores, found: Mapping[str, Values], path: Path) -> None:
    """Fidelity, agreement and pixels by layer, and diversity against the fidelity that is asked for."""
    figure = Figure(figsize=(10, 7), dpi=100, layout="constrained")
    *panels, last = figure.subplots(2, 2).flat
    for axes, (title, lines) in zip(panels, PANELS.items(), strict=True):
        for name, which in lines.items():
            found_of = [values(seeds, *which) for seeds in scores.values()]
            (line,) = axes.plot([np.mean(one or np.nan) for one in found_of], label=name)
            for place, one in enumerate(found_of):
                axes.plot([place] * len(one), one, "o", color=line.get_color(), alpha=0.5)
        axes.set_xticks(range(len(scores)), [*scores])
        axes.set(title=title)
        axes.legend(fontsize="small")
    _plot_diversity(last, found)
    figure.savefig(path)


def _plot_diversity(axes: Axes, found: Mapping[str, Values]) -> None:
    for run, rows in found.items():
        enough = np.isfinite(GRID) & (np.isfinite(rows).mean(0) >= 0.5)
        bands = [mean_of(one[np.isfinite(one)]) for one in rows.T[enough]]
        (line,) = axes.plot(GRID[enough], [one[0] for one in bands], label=run)
        low, high = [one[1] for one in bands], [one[2] for one in bands]
        axes.fill_between(GRID[enough], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    all_of_them = np.all([rows == rows[:, :1] for rows in found.values()], axis=(0, 1))
    left = max(0.0, GRID[all_of_them].max())  # up to here every sample counts
    axes.set(title="diversity of pixels (RMS)", xlabel="samples from this calibrated cosine on")
    axes.set(xlim=(left, None), ylim=(0, None))
    axes.legend(fontsize="small")


def main(plan_path: str, *flags: str) -> None:
    """Read the scores below the plan's folder, sample for diversity, and write the comparison there."""
    plan = yaml.safe_load(Path(plan_path).read_text())
    folder, scores = Path(plan["folder"]), read_scores(plan)
    if not scores:
        sys.exit(f"No run of {plan_path} has been tested yet.")
    found = {run: diversities(plan, run, seeds[0], "--short" in flags) for run, seeds in scores.items()}
    table = markdown(scores, found)
    (folder / "layers.md").write_text(table)
    curves = {run: [[one if isfinite(one) else None for one in row] for row in rows] for run, rows in found.items()}
    (folder / "layers.json").write_text(json.dumps({"scores": scores, "diversity": curves}) + "\n")
    plot(scores, found, folder / "layers.png")
    print(f"\n{table}\nTable in {folder / 'layers.md'}, picture in {folder / 'layers.png'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
