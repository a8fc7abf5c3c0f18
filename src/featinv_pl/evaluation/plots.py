"""Plots of scores: against the severity of corruptions, and their distributions over samples."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from featinv_pl.evaluation.methods import INVERSION, LABELS, label
from featinv_pl.evaluation.results import Document, Name, by_name, column, read_samples
from featinv_pl.pages.pictures import figure_png

LINE_STYLES = ("-", "--", ":", "-.")
CURVES = {"cosine": "cosine of the feature maps", "agreement@1": "agreement of the predicted class"}


def severity(test_set: str) -> tuple[str, int] | None:
    """(corruption, severity) of a test set such as `imagenet-c/fog/3`."""
    parts = test_set.split("/")
    return (parts[-2], int(parts[-1])) if len(parts) > 2 and parts[-1].isdigit() else None


def severity_curves(runs: Mapping[str, Document], clean: str = "clean") -> bytes | None:
    """Cosine and agreement against severity as PNG, with 95 % intervals; None without corruptions.

    Args:
        runs: The scores of one or more inverters by name. Each has a line style, each corruption a colour.
        clean: The test set at severity 0.
    """
    test_sets = {name: found for run in runs.values() for name in run["samples"] if (found := severity(name))}
    if not test_sets:
        return None
    figure = Figure(figsize=(12, 5), layout="constrained")
    corruptions = sorted({corruption for corruption, _ in test_sets.values()})
    palette = colormaps["tab20" if len(corruptions) > 10 else "tab10"]
    colours = {corruption: palette(number) for number, corruption in enumerate(corruptions)}
    panels = figure.subplots(1, len(CURVES))
    for axes, (score, title) in zip(panels, CURVES.items(), strict=True):
        for style, (run, document) in zip(LINE_STYLES * len(runs), runs.items(), strict=False):
            scores = by_name(document)
            for corruption, colour in colours.items():
                names = {found[1]: Name(one, score) for one, found in test_sets.items() if found[0] == corruption}
                points = sorted((level, name) for level, name in {0: Name(clean, score), **names}.items())
                shown = {level: scores[name] for level, name in points if name in scores}
                values = [point["value"] for point in shown.values()]
                name = f"{run}, {corruption.replace('_', ' ')}"
                axes.plot(list(shown), values, style, color=colour, marker=".", label=name)
                bounds = [(point["low"], point["high"]) for point in shown.values() if {"low", "high"} <= point.keys()]
                if shown and len(bounds) == len(shown):
                    axes.fill_between(list(shown), *zip(*bounds, strict=True), color=colour, alpha=0.1, linewidth=0)
        axes.set(xlabel="severity of the corruption (0: clean)", ylabel=title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", loc="outside right upper")
    return figure_png(figure)


def cosine_histograms(runs: Mapping[str, Path], groups: list[str], test_sets: Iterable[str]) -> bytes:
    """The distribution of the cosine over the images of each group, for every method, as PNG.

    Args:
        runs: Folders of inverters by name, as `test` leaves them. The first gives the baselines.
        groups: Test sets, or groups of them.
        test_sets: All test sets of these runs.
    """
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for number, (run, folder) in enumerate(runs.items()):
            table = read_samples(folder, group, test_sets)
            for method in (INVERSION,) if number else LABELS:
                if (name := column("cosine", method)) in table.column_names:
                    values = table[name].drop_null().to_numpy()
                    title = run if method == INVERSION else label(method)
                    axes.hist(values, bins=40, range=(-0.2, 1), density=True, histtype="step", label=title)
        axes.set(xlabel="cosine of the feature maps", title=group, yticks=[])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    return figure_png(figure)
