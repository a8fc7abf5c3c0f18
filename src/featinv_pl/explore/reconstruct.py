"""Feature maps reconstructed: pictures beside their reconstructions, and what these keep of a map at each location."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from featinv_pl.files import write_bytes
from featinv_pl.inverter.pipeline import FeatInvPipeline, as_picture
from featinv_pl.pages.page import Tile
from featinv_pl.pages.pictures import open_picture, overlay, prediction, unique_names
from featinv_pl.types import Observation, predicted

SHEET, FACTS = "contact_sheet.png", "reconstructions.json"
SMALLEST_TILE, CAPTION, GAP = 192, 40, 4  # pixels


def reconstruct_maps(
    pipeline: FeatInvPipeline, maps: Iterable[Tensor], num_samples: int = 1, seed: int = 0
) -> Observation:
    """Reconstruct each of S maps (C, h, w) n times, all from the same noise, and classify the images as bytes.

    Returns:
        On the CPU: images (S, n, 3, H, W) in [-1, 1], features (S, n, C, h, w), logits (S, n, K).
    """
    found = [pipeline.classify(pipeline.reconstruct(one, num_samples, seed)) for one in maps]
    return {
        "images": torch.stack([one["images"] for one in found]).cpu(),
        "features": torch.stack([one["features"] for one in found]).cpu(),
        "logits": torch.stack([one["logits"] for one in found]).cpu(),
    }


def tile(image: Tensor, logits: Tensor, *lines: str, expected: Tensor | None = None) -> Tile:
    """An image (3, H, W) above lines of text and its class, flagged where that is not the class of `expected` (K,)."""
    flagged = expected is not None and int(predicted(logits)) != int(predicted(expected))
    return Tile(as_picture(image), "\n".join([*lines, f"class {prediction(logits)}"]), flagged)


@dataclass(frozen=True)
class Fidelity:
    """Maps of where reconstructions keep the feature map, and of the pixels that it leaves open.

    Attributes:
        cosines: (h, w), between the map and those of its reconstructions, mean over samples.
        spread: (H, W), the standard deviation over samples of pixels in [0, 1], root mean square over colours;
            None for a single sample.
    """

    cosines: Tensor
    spread: Tensor | None

    @classmethod
    def measure(cls, features: Tensor, samples: Observation) -> Self:
        """Compare a map (C, h, w) with its n reconstructions."""
        cosines = cosine_similarity(samples["features"], features.unsqueeze(0), dim=1).mean(0)
        pixels = (samples["images"] + 1) / 2
        spread = pixels.std(0).square().mean(0).sqrt().cpu() if len(pixels) > 1 else None
        return cls(cosines.cpu(), spread)

    def tiles(self, picture: Image.Image) -> list[Tile]:
        """The picture under heat maps: bright is lost, or left open."""
        low, high = self.cosines.min(), self.cosines.max()
        lost = (high - self.cosines) / (high - low).clamp(min=1e-6)
        tiles = [Tile(overlay(picture, lost), f"bright: lost\ncosine {low:.3f} to {high:.3f}")]
        if self.spread is not None:
            top = self.spread.max()
            tiles.append(
                Tile(overlay(picture, self.spread / top.clamp(min=1e-6)), f"bright: open\nspread to {top:.3f}")
            )
        return tiles

    @property
    def facts(self) -> dict[str, Any]:
        """For JSON."""
        facts: dict[str, Any] = {"cosine_by_location": [[round(v, 4) for v in row] for row in self.cosines.tolist()]}
        if self.spread is not None:
            mean, largest = self.spread.mean().item(), self.spread.max().item()
            facts["pixel_spread"] = {"mean": round(mean, 4), "max": round(largest, 4)}
        return facts


def reconstruct(pipeline: FeatInvPipeline, paths: list[Path], folder: Path, num_samples: int, seed: int) -> str:
    """Reconstruct pictures, and return a summary.

    The folder receives `<stem>-<number>.png`, `contact_sheet.png`, and what was measured in `reconstructions.json`.
    """
    pictures = [open_picture(path) for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    rows, facts = [], []
    stems = unique_names([path.stem for path in paths])
    for path, stem, picture in tqdm(list(zip(paths, stems, pictures, strict=True)), "reconstruct", unit="picture"):
        original = pipeline.classify(pipeline.crop([picture]))
        samples = pipeline.classify(pipeline.reconstruct(original["features"][0], num_samples, seed))
        cosines = cosine_similarity(samples["features"], original["features"]).mean(dim=(1, 2)).tolist()
        expected, *predictions = (prediction(logits) for logits in (original["logits"][0], *samples["logits"]))
        shown, *tiles = (as_picture(image) for image in (original["images"][0], *samples["images"]))
        fidelity = Fidelity.measure(original["features"][0], samples)
        row, found = [Tile(shown, f"{stem}\n{expected}")], []
        for number, (one, cosine, name) in enumerate(zip(tiles, cosines, predictions, strict=True)):
            one.save(folder / f"{stem}-{number}.png")
            row.append(Tile(one, f"cosine {cosine:.3f}\n{name}"))
            found.append({"file": f"{stem}-{number}.png", "cosine": round(cosine, 4), "prediction": name})
        rows.append([*row, *fidelity.tiles(shown)])
        facts.append({"picture": str(path), "prediction": expected, "samples": found, **fidelity.facts})
    _sheet(rows).save(folder / SHEET)
    write_bytes(folder / FACTS, (json.dumps(facts, indent=2) + "\n").encode())
    scored = [(one["cosine"], one["prediction"] == fact["prediction"]) for fact in facts for one in fact["samples"]]
    mean, same = (sum(column) / len(scored) for column in zip(*scored, strict=True))
    classified = f", {same:.0%} classified as their original" if pipeline.inverter.classifier.classifies else ""
    return (
        f"{len(scored)} reconstructions of {len(paths)} pictures: mean cosine {mean:.3f}{classified}.\n"
        f"Open {folder / SHEET}."
    )


def _sheet(rows: list[list[Tile]]) -> Image.Image:
    """Tiles in rows, each with its two lines of text below."""
    side = max(SMALLEST_TILE, rows[0][1].picture.width)
    width, height = side + GAP, side + CAPTION
    sheet = Image.new("RGB", (width * len(rows[0]) - GAP, height * len(rows)), "white")
    canvas, font, longest = ImageDraw.Draw(sheet), ImageFont.load_default(size=13), side // 7
    for top, row in enumerate(rows):
        for left, (picture, caption) in enumerate((one.picture, one.caption) for one in row):
            x, y = left * width, top * height
            # Small pictures, such as digits, stay sharp; larger ones are smoothed.
            resample = Image.Resampling.NEAREST if picture.width < SMALLEST_TILE else Image.Resampling.BICUBIC
            sheet.paste(picture.resize((side, side), resample), (x, y))
            lines = [line if len(line) <= longest else f"{line[: longest - 1]}…" for line in caption.splitlines()]
            canvas.multiline_text((x + 4, y + side + 2), "\n".join(lines), fill="black", font=font)
    return sheet
