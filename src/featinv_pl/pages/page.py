"""The output of commands: a page, a picture and the facts; pictures and predictions, as people read them."""

import base64
import io
import json
import re
import textwrap
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


TILE, TEXT, LETTERS = 1.5, 0.15, 23  # inches: side of a picture, height of a line; letters of a line
SHARP = 128  # pixels: the width up to which pictures in a page are PNG
RED = "#b3261e"


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

    @property
    def about(self) -> dict[str, str]:  # what the result knows of its input, for the page
        return {}

    def figure(self) -> "Figure":
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        from featinv_pl.pages.plots import HEIGHT, STYLE, draw

        shown = [section for section in self.sections() if section.rows or section.plot]
        lines = [sum(max(_wrapped(tile).count("\n") + 1 for tile in row) for row in one.rows) for one in shown]
        heights = [
            0.4 + (TILE + 0.1) * len(section.rows) + TEXT * count + HEIGHT * (section.plot is not None)  # inches
            for section, count in zip(shown, lines, strict=True)
        ]
        columns = max((len(row) for section in shown for row in section.rows), default=0)
        with rc_context(STYLE | {"axes.grid": False}):
            figure = Figure(figsize=(max(6.0, TILE * columns), sum(heights)), layout="constrained")
            parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
            for part, section in zip(parts, shown, strict=True):
                part.suptitle(section.title, fontsize="medium")
                if section.plot:
                    draw(section.plot, part)
                    continue
                panels = part.subplots(len(section.rows), columns, squeeze=False)
                for axes in panels.flat:
                    axes.set(xticks=[], yticks=[], frame_on=False)
                for line, row in zip(panels, section.rows, strict=True):
                    for axes, tile in zip(line, row, strict=False):
                        axes.imshow(tile.picture, interpolation="bicubic")
                        style: Any = {"color": RED, "weight": "bold"} if tile.flagged else {}
                        axes.set_xlabel(_wrapped(tile), fontsize="x-small", **style)
        return figure

    def _repr_png_(self) -> bytes:  # what a notebook shows
        return png(self.figure())

    def page(self, about: Mapping[str, str] | None = None) -> str:
        """A self-contained page; `about` is what it says of how it was made: input, model, seed."""
        known = {**(about or {}), **self.about}
        return render("page.html", title=self.title, lead=self.lead, about=known, sections=self.sections())

    def save(self, folder: Path, about: Mapping[str, str] | None = None) -> None:
        """Write the page, the figure and the facts, each atomically, once all three are made; see `page`."""
        facts = json.dumps(self.facts(), indent=2, allow_nan=False) + "\n"
        page, picture = self.page(about), self._repr_png_()
        for suffix, data in (("json", facts.encode()), ("png", picture), ("html", page.encode())):
            write_bytes(folder / f"{self.name}.{suffix}", data)


def _wrapped(tile: Tile) -> str:
    return "\n".join(textwrap.fill(line, LETTERS) for line in tile.caption.splitlines())


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
    environment.filters |= {
        "code": _code,
        "columns": columns,
        "interval": _interval,
        "picture_uri": _picture_uri,
        "plot_uri": _plot_uri,
    }
    return environment.get_template(template).render(**values)


def columns(count: int, most: int) -> int:
    """How many of `count` tiles stand side by side, at most so many, so that the last row is not a single tile."""
    rows = -(-count // most)
    return -(-count // max(rows, 1))


def _code(text: str) -> Markup:
    """A text in which what stands in backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _interval(text: object) -> Markup:
    """A value in front of its interval, `0.98 [0.97, 0.99]`, or another text."""
    return Markup(re.sub(r"^([-+\d.]+%?) (\[[^\]]+\])$", r"\1 <small>\2</small>", str(escape(text))))


def _picture_uri(picture: Image.Image) -> str:
    """A picture within a page: exactly where it is small, as photos are stored where it is large."""
    if picture.width <= SHARP:
        return _uri("png", png(picture))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="jpeg", quality=92, subsampling=0)
    return _uri("jpeg", buffer.getvalue())


def _plot_uri(plot: "Callable[[Axes], Any]") -> str:
    from featinv_pl.pages.plots import svg

    return _uri("svg+xml", svg(plot))


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
