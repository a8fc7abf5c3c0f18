"""Compare the runs of a study that are done: `study.md`, `study.json`, `study.png` and `pictures.png` in its folder.

python experiments/study/table.py experiments/study/digits.yaml
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import t as student

SCORES = {
    "cosine_calibrated": "calibrated cosine",
    "agreement@1": "agreement@1",
    "judge_cosine_calibrated": "judge: calibrated cosine",
    "judge_agreement@1": "judge: agreement@1",
}
CALIBRATED, JUDGED = "cosine_calibrated", "judge_cosine_calibrated"
INVERSION, OWN = "inversion", "own"  # the inverter's own sampler, in metrics.json and in the table
BASELINES = ("ceiling", "regression", "neighbour", "floor", "original")
MARGIN, GAP = 220, 3  # pixels


@dataclass(frozen=True)
class Row:
    """One way of training and sampling, with each of its scores for every seed that is done."""

    run: str
    sampler: str
    scores: Mapping[str, Sequence[float]]


def read_rows(plan: Mapping[str, Any]) -> list[Row]:
    """A row for each run and each of its samplers."""
    rows = []
    for run in plan["runs"]:
        paths = [Path(plan["folder"], run, str(seed), "metrics.json") for seed in plan["seeds"]]
        found = [json.loads(path.read_text())["scores"][plan["source"]] for path in paths if path.is_file()]
        samplers = dict.fromkeys(name for scores in found for name in scores if name not in (INVERSION, *BASELINES))
        for name in (INVERSION, *samplers):
            values = {
                score: [scores[name][score]["value"] for scores in found if score in scores.get(name, {})]
                for score in SCORES
            }
            rows.append(Row(run, OWN if name == INVERSION else name, values))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown: means over seeds with 95 % intervals (Student's t).

    The last columns are the part of the distance between the first row's calibrated cosine and 1 that is gone, and the
    number of seeds.
    """
    table = [["run", "sampler", *SCORES.values(), "gap closed", "seeds"]]
    table += [["---"] * len(table[0])]
    for row in rows:
        values = [interval(row.scores[score]) for score in SCORES]
        table += [[row.run, row.sampler, *values, gap_closed(row, rows[0]), str(len(row.scores[CALIBRATED]))]]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def interval(values: Sequence[float]) -> str:
    """A mean and half its 95 % interval, as far as there are values for them."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    quantile: Any = student.ppf(0.975, len(values) - 1)
    return f"{statistics.fmean(values):.3f} ± {quantile * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def gap_closed(row: Row, reference: Row) -> str:
    """The part of 1 - calibrated cosine of the reference that is gone."""
    own, theirs = row.scores[CALIBRATED], reference.scores[CALIBRATED]
    if not own or not theirs or statistics.fmean(theirs) == 1:
        return ""
    start = statistics.fmean(theirs)
    return f"{(statistics.fmean(own) - start) / (1 - start):.0%}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """The calibrated cosines of every row and seed, by the backbone and by the judge."""
    shown = [row for row in rows if row.scores[CALIBRATED]]
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(shown)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for score, title, marker in ((CALIBRATED, "backbone", "o"), (JUDGED, "judge, unseen", "x")):
        points = [(value, place) for place, row in enumerate(shown) for value in row.scores[score]]
        axes.scatter([value for value, _ in points], [place for _, place in points], s=22, marker=marker, label=title)
    axes.set_yticks(range(len(shown)), [f"{row.run}: {row.sampler}" for row in shown])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set_xlabel("calibrated cosine, a mark for each seed")
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(path)


def draw_strips(plan: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """The first images of the first seed: the originals, then the reconstructions of each row."""
    found: dict[str, Path] = {}
    for row in rows:
        folder = Path(plan["folder"], row.run, str(plan["seeds"][0]), "pictures", plan["source"], "first")
        found.setdefault("original", folder / "original.png")
        found[f"{row.run}: {row.sampler}"] = folder / f"{'reconstruction' if row.sampler == OWN else row.sampler}.png"
    strips = {label: Image.open(file).convert("RGB") for label, file in found.items() if file.is_file()}
    if not strips:
        return
    width, height = next(iter(strips.values())).size
    sheet = Image.new("RGB", (MARGIN + width, (height + GAP) * len(strips) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, (label, strip) in enumerate(strips.items()):
        top = number * (height + GAP)
        sheet.paste(strip, (MARGIN, top))
        draw.text((MARGIN - 6, top + height // 2), label, fill="black", font=font, anchor="rm")
    sheet.save(path)


def main(plan_path: str) -> None:
    """Read the scores below the plan's folder and write the comparison beside them."""
    plan = yaml.safe_load(Path(plan_path).read_text())
    folder, rows = Path(plan["folder"]), read_rows(plan)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.md").write_text(markdown(rows))
    (folder / "study.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    plot(rows, folder / "study.png")
    draw_strips(plan, rows, folder / "pictures.png")
    print(f"\n{markdown(rows)}\nTable in {folder / 'study.md'}, picture in {folder / 'study.png'}")


if __name__ == "__main__":
    main(sys.argv[1])
