"""The table and the pictures of a study."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import t as student

from featinv_pl.pages.pictures import figure_png, picture_png

SCORES = ("cosine_calibrated", "agreement@1", "judge_cosine_calibrated", "judge_agreement@1")
TITLES = ("calibrated cosine", "agreement@1", "judge: calibrated cosine", "judge: agreement@1")

MARGIN, GAP = 220, 3  # pixels


@dataclass(frozen=True)
class Row:
    """One way of training and drawing.

    Attributes:
        run: How it was trained.
        sampler: Which sampler drew: `own`, or the name of an arm.
        scores: For each of `SCORES` its value for every seed that is done.
    """

    run: str
    sampler: str
    scores: Mapping[str, Sequence[float]]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text: means with 95 % intervals over seeds (Student's t), head first.

    The last columns say how much of the distance between the first row's calibrated cosine and 1 is gone, and how
    many seeds there are.
    """
    table = [["run", "sampler", *TITLES, "gap closed", "seeds"]]
    for row in rows:
        values = [_interval(row.scores[score]) for score in SCORES]
        table.append([row.run, row.sampler, *values, _closed(row, rows[0]), str(len(row.scores[SCORES[0]]))])
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    head, *body = cells(rows)
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def dots(rows: Sequence[Row]) -> bytes:
    """A PNG: the calibrated cosines of every row and seed, by the backbone and by the judge."""
    shown = [row for row in rows if row.scores[SCORES[0]]]
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(shown)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for score, title, marker in ((SCORES[0], "backbone", "o"), (SCORES[2], "judge, unseen", "x")):
        points = [(value, place) for place, row in enumerate(shown) for value in row.scores[score]]
        axes.scatter([value for value, _ in points], [place for _, place in points], s=22, marker=marker, label=title)
    axes.set_yticks(range(len(shown)), [f"{row.run}: {row.sampler}" for row in shown])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set_xlabel("calibrated cosine, a mark for each seed")
    figure.legend(loc="outside upper right", ncols=2)
    return figure_png(figure)


def strips(pictures: Mapping[str, Path]) -> bytes:
    """A PNG: strips of images among each other, each with its label to the left.

    Args:
        pictures: The files by label, of equal size.
    """
    rows = {label: Image.open(path).convert("RGB") for label, path in pictures.items()}
    width, height = next(iter(rows.values())).size
    sheet = Image.new("RGB", (MARGIN + width, (height + GAP) * len(rows) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, (label, strip) in enumerate(rows.items()):
        top = number * (height + GAP)
        sheet.paste(strip, (MARGIN, top))
        draw.text((MARGIN - 6, top + height // 2), label, fill="black", font=font, anchor="rm")
    return picture_png(sheet)


def _interval(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    quantile: Any = student.ppf(0.975, len(values) - 1)
    return f"{mean:.3f} ± {quantile * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def _closed(row: Row, reference: Row) -> str:
    own, theirs = row.scores[SCORES[0]], reference.scores[SCORES[0]]
    if not own or not theirs or statistics.fmean(theirs) == 1:
        return ""
    start = statistics.fmean(theirs)
    return f"{(statistics.fmean(own) - start) / (1 - start):.0%}"
