"""Pictures beside their reconstructions: by one inverter, with what these keep of the feature map, or by several."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.explore.exploration import classify, reconstruct_maps
from featinv_pl.files import write_bytes
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.pages.page import (
    Report,
    Section,
    Tile,
    listed_classes,
    overlay,
    prediction,
    render,
    top_classes,
    unique_names,
)
from featinv_pl.types import Observation, predicted

SHEET, FACTS, PAGE = "contact_sheet.png", "reconstructions.json", "reconstructions.html"
SMALLEST_TILE, CAPTION, GAP, MARGIN = 192, 40, 4, 4  # pixels
LEGEND = (
    "Each picture; its reconstructions with the cosine of the feature maps and the predicted class, in a dashed frame "
    "where that is not the picture's; and, laid over the picture, where the reconstructions lose its map most, and "
    "where they differ from one another."
)
LARGEST_PICTURE = 512  # pixels of a side
AT_ONCE = 64  # pictures whose reconstructions are in memory, and those on the page


def reconstruct(
    pipeline: FeatInvPipeline,
    paths: list[Path],
    pictures: list[Image.Image],
    folder: Path,
    num_samples: int,
    seed: int,
    about: Mapping[str, str],
) -> str:
    """Reconstruct pictures, and return a summary.

    The folder receives `<stem>-<number>.png`, all of them in `contact_sheet.png` and, with what they were made from
    (`about`), on the page `reconstructions.html`, and what was measured in `reconstructions.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, facts, scored = [], [], []
    stems = unique_names([path.stem for path in paths])
    for start in range(0, len(paths), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        original = classify(pipeline, pictures[part])
        found = reconstruct_maps(pipeline, original["features"], num_samples, seed)
        for number, (path, stem) in enumerate(zip(paths[part], stems[part], strict=True)):
            images, features, logits = found["images"][number], found["features"][number], found["logits"][number]
            target = original["features"][number, None]
            shown, expected = as_picture(original["images"][number]), prediction(original["logits"][number])
            cosines = cosine_similarity(features, target).mean((1, 2)).tolist()
            row, samples = [Tile(shown, f"{stem}\nclass {expected}")], []
            for sample, (image, cosine, name) in enumerate(zip(images, cosines, map(prediction, logits), strict=True)):
                row.append(Tile(as_picture(image), f"cosine {cosine:.3f}\nclass {name}", name != expected))
                row[-1].picture.save(folder / f"{stem}-{sample}.png")
                samples.append({"file": f"{stem}-{sample}.png", "cosine": round(cosine, 4), "prediction": name})
                scored.append((cosine, name == expected))
            heats, measured = fidelity(shown, target, images, features)
            rows.append([*row, *heats])
            facts.append({"picture": str(path), "prediction": expected, "samples": samples, **measured})
    _sheet(rows).save(folder / SHEET)
    write_bytes(folder / FACTS, (json.dumps(facts, indent=2) + "\n").encode())
    mean, same = (sum(column) / len(scored) for column in zip(*scored, strict=True))
    classified = f", {same:.0%} classified as their original" if pipeline.inverter.classifier.classifies else ""
    summary = f"{len(scored)} reconstructions of {len(paths)} pictures: mean cosine {mean:.3f}{classified}."
    new = {SHEET, *(one["file"] for fact in facts for one in fact["samples"])}
    if older := sorted({path.name for path in folder.glob("*.png")} - new):
        summary += f"\n{len(older)} earlier pictures in {folder}, such as {older[0]}, are not on the sheet."
    few = f" The first {AT_ONCE} are shown." if len(rows) > AT_ONCE else ""
    sections = [Section("Pictures and reconstructions", f"{LEGEND}{few}", rows=rows[:AT_ONCE])]
    page = render("page.html", title="Reconstructions", lead=summary, about=about, sections=sections)
    write_bytes(folder / PAGE, page.encode())
    return summary


def fidelity(
    picture: Image.Image, original: Tensor, images: Tensor, features: Tensor
) -> tuple[list[Tile], dict[str, Any]]:
    """Heat maps of where reconstructions lose a feature map and of the pixels that it leaves open, and both for JSON.

    They are laid over the picture, whose map is (1, C, h, w). The reconstructions are (n, 3, H, W), of which a single
    one leaves no pixels open, and their maps (n, C, h, w).
    """
    cosines = cosine_similarity(features, original).mean(0)
    low, high = cosines.min().item(), cosines.max().item()
    lost = (high - cosines) / max(high - low, 1e-6)
    tiles = [Tile(overlay(picture, lost), f"bright: map lost\ncosine {low:.3f} to {high:.3f}")]
    facts: dict[str, Any] = {"cosine_by_location": [[round(v, 4) for v in row] for row in cosines.tolist()]}
    if len(images) > 1:
        # The standard deviation of pixels in [0, 1], root mean square over colours.
        spread = (images / 2).std(0).square().mean(0).sqrt()
        mean, top = spread.mean().item(), spread.max().item()
        tiles.append(
            Tile(overlay(picture, spread / max(top, 1e-6)), f"bright: samples differ\ndeviation up to {top:.3f}")
        )
        facts["pixel_spread"] = {"mean": round(mean, 4), "max": round(top, 4)}
    return tiles, facts


def _sheet(rows: list[list[Tile]]) -> Image.Image:
    side = max(SMALLEST_TILE, rows[0][1].picture.width)
    width, height = side + GAP, side + CAPTION
    sheet = Image.new("RGB", (width * len(rows[0]) - GAP, height * len(rows)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for top, row in enumerate(rows):
        for left, one in enumerate(row):
            x, y = left * width, top * height
            sheet.paste(one.picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
            lines = [_fitted(line, side - MARGIN, font.getlength) for line in one.caption.splitlines()]
            canvas.multiline_text((x + MARGIN, y + side + 2), "\n".join(lines), fill="black", font=font)
    return sheet


def _fitted(line: str, width: float, length: Callable[[str], float]) -> str:
    """As much of a line as fits."""
    parts = (f"{line[:end]}…" for end in range(len(line) - 1, -1, -1))
    return next((text for text in (line, *parts) if length(text) <= width), "")


@dataclass(frozen=True)
class Comparison(Report):
    """Pictures, and their reconstructions by several inverters."""

    name, title = "comparison", "Comparison of inverters"
    lead = (
        "Each picture beside its reconstruction by each inverter, from the feature map of the inverter's own "
        "classifier. Below an image its inverter, the cosine of the two maps, and the class predicted before and "
        "after, in a dashed frame where they differ."
    )

    pictures: dict[str, Image.Image]  # P of them, by name
    # For each inverter what its classifier says of the pictures, and of its reconstructions: P maps of one sample each.
    models: dict[str, tuple[Observation, Observation]]

    def cosines(self, model: str) -> list[float]:
        """Of the pictures' maps with those of their reconstructions, averaged over locations."""
        before, after = self.models[model]
        return cosine_similarity(after["features"][:, 0], before["features"]).mean((1, 2)).tolist()

    def _tile(self, model: str, number: int) -> Tile:
        seen, drawn = self.models[model]
        before, after = seen["logits"][number], drawn["logits"][number, 0]
        caption = f"{model}\ncosine {self.cosines(model)[number]:.3f}\n{prediction(before)} → {prediction(after)}"
        picture = as_picture(drawn["images"][number, 0])
        return Tile(picture, caption, int(predicted(before)) != int(predicted(after)))

    def sections(self) -> list[Section]:
        rows = [
            [Tile(picture, name), *(self._tile(model, number) for model in self.models)]
            for number, (name, picture) in enumerate(self.pictures.items())
        ]
        table = [
            [name, model, listed_classes(before["logits"][number]), listed_classes(after["logits"][number, 0])]
            for number, name in enumerate(self.pictures)
            for model, (before, after) in self.models.items()
        ]
        return [
            Section("Reconstructions", rows=rows),
            Section("The five most likely classes", table=[["picture", "model", "before", "after"], *table]),
        ]

    def facts(self) -> dict[str, Any]:
        return {
            name: {
                model: {
                    "cosine": self.cosines(model)[number],
                    "before": top_classes(before["logits"][number]),
                    "after": top_classes(after["logits"][number, 0]),
                }
                for model, (before, after) in self.models.items()
            }
            for number, name in enumerate(self.pictures)
        }


def compare(
    models: Iterable[tuple[str, FeatInvPipeline]], names: Sequence[str], pictures: Sequence[Image.Image], seed: int = 0
) -> Comparison:
    """Reconstruct pictures by several inverters, which are taken one after another: one at a time is in memory."""
    found = {}
    for name, pipeline in models:
        before = classify(pipeline, pictures)
        found[name] = before, reconstruct_maps(pipeline, before["features"], seed=seed)
    small = [ImageOps.contain(picture, (LARGEST_PICTURE, LARGEST_PICTURE)) for picture in pictures]
    return Comparison(dict(zip(names, small, strict=True)), found)
