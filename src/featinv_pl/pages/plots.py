"""Plots that can be read without telling red from green, in print and in the dark; legends keep off the lines."""

import io
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.rcsetup import cycler

Plot = Callable[[Axes], Any]
WIDTH, HEIGHT = 5.0, 3.2  # inches of a plot
LETTERS = 60  # of a legend, that fit the width of a plot
# Okabe and Ito (Color Universal Design, 2008), without yellow, which white paper swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
LINES = ("-", "--", "-.", ":", "-", "--", "-.")
STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=LINES),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "featinv-pl",  # the same plot is the same file
}


def draw(plot: Plot, part: Figure | SubFigure) -> None:
    """Draw a plot; its legend goes below the axes."""
    axes = part.subplots()
    plot(axes)
    if legend := axes.get_legend():
        names, title = [text.get_text() for text in legend.get_texts()], legend.get_title().get_text() or None
        handles = [handle for handle in legend.legend_handles if handle]
        legend.remove()
        columns = max(1, min(len(names), LETTERS // (max(map(len, names)) + 6)))
        part.legend(handles, names, loc="outside lower center", ncols=columns, title=title)


def svg(plot: Plot) -> bytes:
    """A plot as SVG on a transparent ground."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw(plot, figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def sheet(plots: Mapping[str, Plot], columns: int = 4) -> bytes:
    """All plots in one PNG, each below its name."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        columns = min(columns, len(plots))
        rows = -(-len(plots) // columns)
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
        parts = figure.subfigures(rows, columns, squeeze=False).flat
        for part, (name, plot) in zip(parts, plots.items(), strict=False):
            part.suptitle(name)
            draw(plot, part)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
