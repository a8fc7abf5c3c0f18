"""The output of commands: a page, a picture and the facts; pictures and predictions, as people read them."""

import base64
import io
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from featinv_pl.decoding import NoImageError, open_image
from featinv_pl.errors import UserError
from featinv_pl.files import write_bytes

if TYPE_CHECKING:  # pictures need no plots
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPACITY = 0.6  # of a heat map at its hottest
_info = cache(ImageNetInfo)


def open_picture(path: Path, option: str = "IMAGE") -> Image.Image:
    """Decode a picture completely, so that a damaged one is refused before anything is computed."""
    try:
        return open_image(path)
    except NoImageError as error:
        advice = "Leave it out or replace it."
        raise UserError(f"{option}: '{path}' cannot be read as a picture ({error}). {advice}") from error


def png(shown: "Image.Image | Figure") -> bytes:
    """A picture or a figure as PNG."""
    buffer = io.BytesIO()
    save = shown.save if isinstance(shown, Image.Image) else shown.savefig
    save(buffer, format="png")
    return buffer.getvalue()


def unique_names(names: Sequence[str]) -> list[str]:
    """Names for files or columns: with a number in front where several are the same."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{number}-{name}" for number, name in enumerate(names)]


def class_name(index: int, num_classes: int) -> str:
    """A class's number, and its name where the head is one of ImageNet's: 1k, 12k, 21k or 22k."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    words = _info(subset).index_to_description(index).split(",")[0] if subset else ""
    return f"{index} {words}".strip()


def prediction(logits: Tensor) -> str:
    """The class that logits (K,) make most likely; `none` of a network without classes."""
    return class_name(int(logits.argmax()), len(logits)) if len(logits) else "none"


def top_classes(logits: Tensor, count: int = 5) -> dict[str, float]:
    """The most likely classes of logits (K,) by name, with their probabilities, in descending order."""
    probabilities, indices = logits.float().softmax(0).topk(min(count, len(logits)))
    names = [class_name(index, len(logits)) for index in indices.tolist()]
    return dict(zip(names, (round(value, 4) for value in probabilities.tolist()), strict=True))


def listed_classes(logits: Tensor) -> str:
    """The most likely classes of logits (K,) with their probabilities, in a line."""
    return ", ".join(f"{name} ({share:.2f})" for name, share in top_classes(logits).items())


def overlay(picture: Image.Image, heat: Tensor) -> Image.Image:
    """Lay a heat map (h, w) in [0, 1] over a picture: the hotter, the more opaque."""
    from matplotlib import colormaps

    grid = Image.fromarray((heat.clamp(0, 1) * 255).byte().cpu().numpy())
    level = np.asarray(grid.resize(picture.size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
    share = OPACITY * level[..., None]
    mixed = np.asarray(picture) * (1 - share) + colormaps["magma"](level)[..., :3] * 255 * share
    return Image.fromarray(mixed.round().astype(np.uint8))


TILE, PLOT, TEXT = 1.2, 2.8, 0.17  # inches: side of a picture, height of a plot, height of a line
RED = "#b00020"


@dataclass(frozen=True)
class Tile:
    """A picture with a few lines of text below it, which a flag turns red."""

    picture: Image.Image
    caption: str
    flagged: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a page: a paragraph, rows of pictures, a plot, a table with its header first."""

    title: str
    text: str = ""
    rows: Sequence[Sequence[Tile]] = ()
    plot: "Callable[[Axes], Any] | None" = None
    table: Sequence[Sequence[str]] = ()


class Report(ABC):
    """A result with a page; its files are `<name>.html`, `<name>.png` and `<name>.json`."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    @abstractmethod
    def lead(self) -> str: ...  # the first paragraph: what is shown, and what was measured

    @abstractmethod
    def sections(self) -> list[Section]: ...

    @abstractmethod
    def facts(self) -> dict[str, Any]: ...  # all measurements, for JSON

    def figure(self) -> "Figure":
        from matplotlib.figure import Figure

        shown = [section for section in self.sections() if section.rows or section.plot]
        lines = [sum(max(tile.caption.count("\n") + 1 for tile in row) for row in section.rows) for section in shown]
        heights = [
            0.4 + TILE * len(section.rows) + TEXT * count + PLOT * (section.plot is not None)  # inches
            for section, count in zip(shown, lines, strict=True)
        ]
        columns = max((len(row) for section in shown for row in section.rows), default=0)
        figure = Figure(figsize=(max(6.0, TILE * columns), sum(heights)), layout="constrained")
        parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, section in zip(parts, shown, strict=True):
            part.suptitle(section.title, fontsize="medium")
            if section.plot:
                section.plot(part.subplots())
                continue
            panels = part.subplots(len(section.rows), columns, squeeze=False)
            for axes in panels.flat:
                axes.set(xticks=[], yticks=[], frame_on=False)
            for line, row in zip(panels, section.rows, strict=True):
                for axes, tile in zip(line, row, strict=False):
                    axes.imshow(tile.picture)
                    axes.set_xlabel(tile.caption, fontsize="x-small", color=RED if tile.flagged else "black")
        return figure

    def _repr_png_(self) -> bytes:  # what a notebook shows
        return png(self.figure())

    def save(self, folder: Path) -> None:
        """Write the page, the figure and the facts, each atomically, once all three are made."""
        facts = json.dumps(self.facts(), indent=2, allow_nan=False) + "\n"
        page = render("page.html", title=self.title, lead=self.lead, sections=self.sections())
        picture = self._repr_png_()
        for suffix, data in (("json", facts.encode()), ("png", picture), ("html", page.encode())):
            write_bytes(folder / f"{self.name}.{suffix}", data)


def plot_probabilities(axes: "Axes", x: Sequence[float], lines: Mapping[str, Tensor], xlabel: str) -> None:
    """Plot probabilities of classes, by name."""
    for name, values in lines.items():
        axes.plot(x, values.numpy(), marker=".", label=name)
    axes.set(xlabel=xlabel, ylabel="probability", ylim=(-0.02, 1.02))
    axes.legend(fontsize="small", title="class")


def render(template: str, **values: Any) -> str:
    """Fill one of the templates of this folder."""
    loader = PackageLoader("featinv_pl.pages", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"code": _code, "picture_uri": lambda one: data_uri(png(one)), "plot_uri": _plot_uri}
    return environment.get_template(template).render(**values)


def _code(text: str) -> Markup:
    """A text in which what stands in backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def data_uri(data: bytes) -> str:
    """A PNG within a page."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _plot_uri(section: Section) -> str:
    from matplotlib.figure import Figure

    assert section.plot
    figure = Figure(figsize=(6, PLOT), dpi=150, layout="constrained")
    section.plot(figure.subplots())
    return data_uri(png(figure))
