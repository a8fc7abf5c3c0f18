"""Plots of scores: against the severity of corruptions, and their distributions over samples."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from featinv_pl.callbacks.results import ARMS, Document, read_samples

LINE_STYLES = ("-", "--", ":", "-.")
CURVES = {"cosine": "cosine of the feature maps", "agreement@1": "agreement of the predicted class"}


def severity(source: str) -> tuple[str, int] | None:
    """(corruption, severity) of a source such as `imagenet-c/fog/3`."""
    parts = source.split("/")
    return (parts[-2], int(parts[-1])) if len(parts) > 2 and parts[-1].isdigit() else None


def severity_curves(runs: Mapping[str, Document], clean: str = "clean") -> bytes | None:
    """Cosine and agreement against severity as PNG, with 95 % intervals; None without corruptions.

    Args:
        runs: The scores of one or more inverters by name. Each has a line style, each corruption a colour.
        clean: The source at severity 0.
    """
    sources = {source: found for run in runs.values() for source in run["samples"] if (found := severity(source))}
    if not sources:
        return None
    figure = Figure(figsize=(12, 5), layout="constrained")
    names = sorted({name for name, _ in sources.values()})
    colours = {name: colormaps["tab20" if len(names) > 10 else "tab10"](number) for number, name in enumerate(names)}
    panels = figure.subplots(1, len(CURVES))
    for axes, (score, label) in zip(panels, CURVES.items(), strict=True):
        for style, (run, document) in zip(LINE_STYLES * len(runs), runs.items(), strict=False):
            for corruption, colour in colours.items():
                points = {found[1]: f"{source}/{score}" for source, found in sources.items() if found[0] == corruption}
                points = {0: f"{clean}/{score}", **points}
                shown = sorted((level, name) for level, name in points.items() if name in document["scores"])
                values = [document["scores"][name] for _, name in shown]
                levels = [level for level, _ in shown]
                name = f"{run}, {corruption.replace('_', ' ')}"
                axes.plot(levels, values, style, color=colour, marker=".", label=name)
                if all(name in document["intervals"] for _, name in shown):
                    bounds = zip(*(document["intervals"][name] for _, name in shown), strict=True)
                    axes.fill_between(levels, *bounds, color=colour, alpha=0.1, linewidth=0)
        axes.set(xlabel="severity of the corruption (0: clean)", ylabel=label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="outside right upper")
    return png(figure)


def cosine_histograms(runs: Mapping[str, Path], sources: list[str], known: Iterable[str]) -> bytes:
    """How the cosine is distributed over the samples of each source, for every arm, as PNG.

    Args:
        runs: Folders of inverters by name, as `test` has left them. The first gives the other arms.
        sources: Sources, or groups of them.
        known: All sources of these runs.
    """
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
        for number, (run, folder) in enumerate(runs.items()):
            table = read_samples(folder, source, known)
            arms = {"": run} if number else {**ARMS, "": run}
            for arm, label in arms.items():
                if f"cosine{arm}" in table.column_names:
                    values = table[f"cosine{arm}"].drop_null().to_numpy()
                    axes.hist(values, bins=40, range=(-0.2, 1), density=True, histtype="step", label=label)
        axes.set(xlabel="cosine of the feature maps", title=source, yticks=[])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    return png(figure)


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
