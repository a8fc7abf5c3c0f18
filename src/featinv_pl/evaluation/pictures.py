"""Pictures of each test set, originals above their reconstructions, plots of scores, and what the loggers get."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.evaluation.reconstructions import Reconstruction
from featinv_pl.evaluation.results import (
    CEILING,
    INVERSION,
    LABELS,
    ORIGINAL,
    Document,
    Name,
    by_name,
    column,
    label,
    read_samples,
)
from featinv_pl.files import write_bytes
from featinv_pl.pages.page import class_name, png
from featinv_pl.pages.plots import LINES, Plot
from featinv_pl.types import Batch, to_uint8

PICTURES, FIRST, FACTS_FILE, POOL = "pictures", "first", "tiles.json", 128
CURVES = {"cosine": "cosine of the feature maps", "agreement@1": "share with the original's class"}
CLASSES = ("label", "prediction", "reconstruction_prediction")
FACTS = (*CLASSES, "cosine")


class Pictures:
    """Writes and logs images of every test set: original, autoencoder, and a reconstruction by each sampler.

    `pictures/<test set>/first/` gets one strip of tiles per method with the first images, which are the same for every
    inverter, and `tiles.json` with their facts and the digest of the weights (`checkpoint`). `extremes/` gets the best,
    the median and the worst images by cosine among the first 128; test sets are stored in random order, so these are a
    fair sample. Loggers get the strips as one picture. A thread writes and logs, while the next test set is scored.
    """

    def __init__(
        self,
        num_images: int,
        samplers: Sequence[str],
        root: Path,
        checkpoint: Any,
        loggers: Sequence[Logger],
        step: int,
        classes: Mapping[int, str],
    ) -> None:
        self.num_images, self.folder, self.checkpoint = num_images, root / PICTURES, checkpoint
        self.rows = {method: label(method) for method in (ORIGINAL, CEILING, INVERSION, *samplers)}
        self.loggers, self.step, self.classes = loggers, step, classes  # names of folders, by label
        self.thread, self.pending = ThreadPoolExecutor(1), list[Future[None]]()
        self._begin(None)

    def _begin(self, test_set: str | None) -> None:
        self.test_set = test_set
        self.tiles: dict[str, list[Tensor]] = {name: [] for name in self.rows.values()}
        self.facts: dict[str, list[Any]] = {name: [] for name in FACTS}
        self.num_classes = 0

    def update(self, batch: Batch, made: Mapping[str, Reconstruction]) -> None:
        """Keep the first images of a test set, and show those of the set before it."""
        if batch["source"][0] != self.test_set:
            self.show()
            self._begin(batch["source"][0])
        left = POOL - len(self.facts["cosine"])
        for method, name in self.rows.items():
            self.tiles[name] += to_uint8(made[method]["images"][:left]).cpu().unbind()
        cosines = cosine_similarity(made[INVERSION]["features"], batch["features"]).mean((1, 2)).tolist()
        classes = [_classes(item["logits"]) for item in (batch, made[INVERSION])]
        self.num_classes = batch["logits"].shape[1]
        facts = (batch["labels"].tolist(), *classes, [round(cosine, 4) for cosine in cosines])
        for name, values in zip(FACTS, facts, strict=True):
            self.facts[name] += values[:left]

    @rank_zero_only
    def show(self) -> None:
        if self.test_set is None:
            return
        first = list(range(len(self.facts["cosine"])))[: self.num_images]
        for name, chosen in ((FIRST, first), ("extremes", self._extremes())):
            strips = {
                row: torch.cat([tiles[index] for index in chosen], dim=2).permute(1, 2, 0).numpy()
                for row, tiles in self.tiles.items()
            }
            facts: dict[str, list[Any]] = {
                fact: [values[index] for index in chosen] for fact, values in self.facts.items()
            }
            for fact in CLASSES:
                facts[fact] = [self._named(index) for index in facts[fact]]
            self.pending.append(self.thread.submit(self._write, f"{self.test_set}/{name}", strips, facts))
        self._begin(None)

    def finish(self) -> None:
        """Show the last test set, and wait until all is written and logged."""
        self.show()
        for written in self.pending:
            written.result()
        self.thread.shutdown()

    def _write(self, name: str, strips: Mapping[str, NDArray[np.uint8]], facts: Mapping[str, list[Any]]) -> None:
        for row, strip in strips.items():
            write_bytes(self.folder / name / f"{row}.png", png(Image.fromarray(strip)))
        write_bytes(self.folder / name / FACTS_FILE, json.dumps({"checkpoint": self.checkpoint, **facts}).encode())
        test_set, _, chosen = name.rpartition("/")
        caption = f"{test_set}, {chosen}, from top to bottom: {', '.join(strips)}"
        picture = np.concatenate(list(strips.values()))
        log_picture(self.loggers, f"reconstructions/{name}", picture, caption, self.step)

    def _named(self, index: int) -> str:
        """A class by number and name: ImageNet's, or else that of its folder; `none` without one."""
        if index < 0:
            return "none"
        known, folder = class_name(index, self.num_classes), self.classes.get(index, "")
        return known if " " in known or folder in ("", known) else f"{index} {folder}"

    def _extremes(self) -> list[int]:
        """A third each of the best, the median and the worst; if they are few, all from best to worst."""
        cosines, third = self.facts["cosine"], self.num_images // 3
        ranked = sorted(range(len(cosines)), key=lambda index: -cosines[index])
        if len(ranked) <= 3 * third or not third:
            return ranked[: self.num_images]
        middle = (len(ranked) - third) // 2
        return ranked[:third] + ranked[middle : middle + third] + ranked[-third:]


def _classes(logits: Tensor) -> list[Any]:
    return logits.argmax(1).tolist() if logits.shape[1] else [-1] * len(logits)


def log_picture(loggers: Sequence[Logger], name: str, pixels: NDArray[np.uint8], caption: str, step: int) -> None:
    """Give a picture (H, W, 3) to W&B, which takes floats in [0, 1] for bytes and shows black, and to TensorBoard."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [pixels], step, caption=[caption])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
            logger.experiment.add_text(f"{name}/caption", caption, step)


def log_table(loggers: Sequence[Logger], name: str, table: list[list[str]], caption: str, step: int) -> None:
    """Give a table, head first, to W&B, whose tables have no caption, and to TensorBoard."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, columns=table[0], data=table[1:], step=step)
        elif isinstance(logger, TensorBoardLogger):
            lines = [f"| {' | '.join(row)} |" for row in (table[0], ["---"] * len(table[0]), *table[1:])]
            logger.experiment.add_text(name, "\n".join([f"{caption}\n", *lines]), step)


def severity_plots(runs: Mapping[str, Document], score: str, clean: str = "clean") -> dict[str, Plot]:
    """One of `CURVES` against the severity of each corruption, with 95 % intervals; none without corruptions.

    `clean` is the test set at severity 0.
    """
    found = (re.fullmatch(r".+/([^/]+)/(\d+)", name) for run in runs.values() for name in run["samples"])
    corruptions: dict[str, dict[int, str]] = {}
    for match in filter(None, found):
        corruptions.setdefault(match[1], {0: clean})[int(match[2])] = match[0]
    scores = {run: by_name(document) for run, document in runs.items()}

    def plot(axes: Axes, levels: Mapping[int, str]) -> None:
        for run, known in scores.items():
            names = {level: Name(test_set, score) for level, test_set in sorted(levels.items())}
            points = {level: known[name] for level, name in names.items() if name in known}
            (line,) = axes.plot([*points], [point["value"] for point in points.values()], marker=".", label=run)
            bounds = [(point["low"], point["high"]) for point in points.values() if {"low", "high"} <= point.keys()]
            if points and len(bounds) == len(points):
                low, high = zip(*bounds, strict=True)
                axes.fill_between([*points], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel=f"severity (0: {clean})", ylabel=CURVES[score], xticks=sorted(levels))
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.02)
        if len(runs) > 1:
            axes.legend()

    known = {name for one in scores.values() for name in one}
    return {
        corruption.replace("_", " "): partial(plot, levels=levels)
        for corruption, levels in sorted(corruptions.items())
        if any(Name(test_set, score) in known for test_set in levels.values())
    }


def cosine_plots(runs: Mapping[str, Path], groups: Iterable[str], test_sets: Iterable[str]) -> dict[str, Plot]:
    """The distribution of the cosine over the images of each group, for every method.

    The first of the inverters, whose folders are given by name, gives the baselines. See `read_samples`.
    """

    def plot(axes: Axes, group: str) -> None:
        styles = itertools.cycle(LINES)
        for number, (run, folder) in enumerate(runs.items()):
            table = read_samples(folder, group, test_sets)
            for method in (INVERSION,) if number else LABELS:
                if (name := column("cosine", method)) in table.column_names:
                    values = table[name].drop_null().to_numpy().clip(-1, 1)
                    shares = np.full(len(values), 1 / max(len(values), 1))
                    title = run if method == INVERSION else label(method)
                    style: Any = {"histtype": "step", "linewidth": 1.5, "linestyle": next(styles)}
                    axes.hist(values, bins=40, range=(-0.2, 1), weights=shares, label=title, **style)
        axes.set(xlabel="cosine of the feature maps", ylabel="share of images", xlim=(-0.2, 1.02))
        axes.legend()

    return {group: partial(plot, group=group) for group in groups}
