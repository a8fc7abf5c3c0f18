"""One self-contained page from scored inversions: pictures, tables, curves."""

import base64
import io
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from featinv_pl.callbacks.files import SCORES, write_bytes
from featinv_pl.callbacks.reconstruction_grid import FACTS_FILE, PICTURES
from featinv_pl.errors import UserError

STAGES = "stages.json"
HEADLINES = ("cosine", "agreement@1", "agreement@5", "label@1")
LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Arm:
    """One scored inverter.

    Attributes:
        name: Name of its folder.
        folder: Holds `scores.json` and `pictures/`.
        scores: By `<source>/<score>`, as `scores.json` has them.
    """

    name: str
    folder: Path
    scores: dict[str, float]

    def tiles(self, source: str) -> dict[str, list[Any]]:
        """Labels, predictions and cosines of the pictured images."""
        tiles: dict[str, list[Any]] = json.loads((self.folder / PICTURES / source / FACTS_FILE).read_text())
        return tiles

    def strip(self, source: str, row: str) -> Path:
        """The picture of one row of tiles."""
        return self.folder / PICTURES / source / f"{row}.png"


def report(folder: Path) -> None:
    """Write `report.html`, `metrics.json` and `overview.png` from the inverters scored below a folder.

    Args:
        folder: Holds one folder per inverter, with the scores and pictures that `test` has left there.
    """
    arms = _arms(folder)
    sources = _sources(arms)
    groups = list(dict.fromkeys(source.split("/")[0] for source in sources))
    stages = folder / STAGES
    page = _template().render(
        arms=arms,
        groups=groups,
        headlines=HEADLINES,
        all_scores=sorted({name for arm in arms for name in arm.scores}),
        curve=_data_uri(_curve(arms, sources)),
        pictures=[(source, _rows(arms, source)) for source in sources],
        stages=json.loads(stages.read_text()) if stages.is_file() else {},
    )
    metrics = json.dumps({arm.name: arm.scores for arm in arms}, indent=2) + "\n"
    write_bytes(folder / "metrics.json", metrics.encode())
    write_bytes(folder / "overview.png", _overview(arms, sources, groups))
    write_bytes(folder / "report.html", page.encode())


def _arms(folder: Path) -> list[Arm]:
    """The scored inverters, the most faithful first."""
    arms = [Arm(path.parent.name, path.parent, json.loads(path.read_text())) for path in folder.glob(f"*/{SCORES}")]
    if not arms:
        raise UserError(
            f"report: there is no scored inverter below '{folder}', that is, no <name>/{SCORES}. "
            "Run `featinv-pl test` with the ScoreFile callback and a default_root_dir below that folder first."
        )

    def fidelity(arm: Arm) -> float:
        cosines = [value for name, value in arm.scores.items() if name.endswith("/cosine")]
        return sum(cosines) / max(len(cosines), 1)

    return sorted(arms, key=fidelity, reverse=True)


def _sources(arms: list[Arm]) -> list[str]:
    """Sources with scores, and pictures by every arm: whole data sets first, then corruptions by name and severity."""
    pictured = [
        {path.parent.relative_to(arm.folder / PICTURES).as_posix() for path in arm.folder.rglob(FACTS_FILE)}
        for arm in arms
    ]
    scored = {name.rpartition("/")[0] for arm in arms for name in arm.scores}
    return sorted(scored.intersection(*pictured), key=lambda source: (source.count("/"), source))


def _rows(arms: list[Arm], source: str) -> list[dict[str, Any]]:
    """Rows of a picture: the original, the autoencoder alone, and each arm."""
    tiles = arms[0].tiles(source)
    rows: list[dict[str, Any]] = [
        {"name": "original", "image": arms[0].strip(source, "original"), "classes": tiles["prediction"]},
        {"name": "autoencoder", "image": arms[0].strip(source, "autoencoder"), "classes": []},
    ]
    for arm in arms:
        facts = arm.tiles(source)
        image = arm.strip(source, "reconstruction")
        rows.append({"name": arm.name, "image": image, "classes": facts["reconstruction_prediction"]})
    return [{**row, "image": _data_uri(row["image"].read_bytes())} for row in rows]


def _severity(source: str) -> tuple[str, int] | None:
    """(corruption, severity) of a source such as `imagenet-c/fog/3`."""
    parts = source.split("/")
    return (parts[-2], int(parts[-1])) if len(parts) > 2 and parts[-1].isdigit() else None


def _curve(arms: list[Arm], sources: list[str]) -> bytes:
    """Cosine against severity: a colour for each corruption, a line style for each arm, as PNG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    corruptions = sorted({found[0] for source in sources if (found := _severity(source))})
    for style, arm in zip(LINE_STYLES * len(arms), arms, strict=False):
        clean = arm.scores.get("clean/cosine")
        for colour, corruption in enumerate(corruptions):
            points = {
                found[1]: arm.scores[f"{source}/cosine"]
                for source in sources
                if (found := _severity(source)) and found[0] == corruption and f"{source}/cosine" in arm.scores
            }
            if clean is not None:
                points[0] = clean
            label = f"{arm.name}, {corruption.replace('_', ' ')}"
            axes.plot(*zip(*sorted(points.items()), strict=True), style, color=f"C{colour}", marker="o", label=label)
    axes.set_xlabel("severity of the corruption (0: clean)")
    axes.set_ylabel("cosine of the feature maps")
    if corruptions:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure)


def _overview(arms: list[Arm], sources: list[str], groups: list[str]) -> bytes:
    """One picture, with the last source of each group: originals above their reconstructions, as PNG."""
    shown = [[source for source in sources if source.split("/")[0] == group] for group in groups]
    chosen = [below[-1] for below in shown]
    figure = Figure(figsize=(9, 0.8 * (len(arms) + 1) * len(chosen) + 0.4 * len(chosen)), layout="constrained")
    for part, source in zip(figure.subfigures(len(chosen), 1, squeeze=False)[:, 0], chosen, strict=True):
        rows = [("original", arms[0].strip(source, "original"))]
        rows += [(arm.name, arm.strip(source, "reconstruction")) for arm in arms]
        part.suptitle(source, fontsize="medium")
        for axes, (name, path) in zip(part.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
            axes.imshow(np.asarray(Image.open(path)), aspect="equal")
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
            axes.set(xticks=[], yticks=[])
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files("featinv_pl.viz") / "report.html").read_text())
