"""Pictures next to what an inverter draws from their feature maps."""

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from featinv_pl.explore.fidelity import Fidelity
from featinv_pl.files import write_bytes
from featinv_pl.inverter.pipeline import FeatInvPipeline, as_picture
from featinv_pl.pages.pictures import open_picture, prediction, unique_names

SHEET, FACTS = "contact_sheet.png", "reconstructions.json"
SMALLEST_TILE, CAPTION, GAP = 192, 40, 4  # pixels


def reconstruct(pipeline: FeatInvPipeline, paths: list[Path], folder: Path, num_samples: int, seed: int) -> str:
    """Write reconstructions as PNGs, a contact sheet, and their cosines and predictions as JSON.

    Two heat maps end each row of the sheet: where the reconstructions lose the map, and, of several samples, where the
    map leaves pixels open.

    Args:
        pipeline: The inverter.
        paths: Pictures.
        folder: Where to: `<stem>-<number>.png`, `contact_sheet.png`, `reconstructions.json`.
        num_samples: Reconstructions of each picture.
        seed: Of the noise.

    Returns:
        A summary in a sentence.
    """
    pictures = [open_picture(path) for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    rows, facts = [], []
    scored: list[tuple[float, bool]] = []
    stems = unique_names([path.stem for path in paths])
    for path, stem, picture in tqdm(list(zip(paths, stems, pictures, strict=True)), "reconstruct", unit="picture"):
        original = pipeline.classify(pipeline.crop([picture]))
        drawn = pipeline.classify(pipeline.reconstruct(original["features"][0], num_samples, seed))
        cosines = cosine_similarity(drawn["features"], original["features"]).mean(dim=(1, 2)).tolist()
        predictions = [prediction(logits) for logits in (original["logits"][0], *drawn["logits"])]
        tiles = [as_picture(image) for image in (original["images"][0], *drawn["images"])]
        names = [f"{stem}-{number}.png" for number in range(num_samples)]
        for name, tile in zip(names, tiles[1:], strict=True):
            tile.save(folder / name)
        captions = [stem, *(f"cosine {cosine:.3f}" for cosine in cosines)]
        kept = Fidelity.measure(original["features"][0], drawn)
        rows.append([(tile, *lines) for tile, *lines in zip(tiles, captions, predictions, strict=True)])
        rows[-1] += kept.tiles(tiles[0])
        samples = [
            {"file": name, "cosine": round(cosine, 4), "prediction": predicted}
            for name, cosine, predicted in zip(names, cosines, predictions[1:], strict=True)
        ]
        facts.append({"picture": str(path), "prediction": predictions[0], "samples": samples, **kept.facts})
        scored += [(cosine, name == predictions[0]) for cosine, name in zip(cosines, predictions[1:], strict=True)]
    _sheet(rows).save(folder / SHEET)
    write_bytes(folder / FACTS, (json.dumps(facts, indent=2) + "\n").encode())
    cosine = sum(cosine for cosine, _ in scored) / len(scored)
    same = f", {sum(same for _, same in scored)} classified as their original"
    classified = same if pipeline.inverter.classifier.classifies else ""
    number = f"{len(scored)} reconstructions of {len(paths)} pictures"
    return f"{number}: mean cosine {cosine:.3f}{classified}.\nOpen {folder / SHEET}."


def _sheet(rows: list[list[Any]]) -> Image.Image:
    """Pictures (tile, caption, prediction) in rows, each with its two lines of text below."""
    side = max(SMALLEST_TILE, rows[0][1][0].width)
    width, height = side + GAP, side + CAPTION
    sheet = Image.new("RGB", (width * len(rows[0]) - GAP, height * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for top, row in enumerate(rows):
        for left, (tile, *lines) in enumerate(row):
            x, y = left * width, top * height
            # Small pictures, such as digits, stay sharp; larger ones are smoothed.
            resample = Image.Resampling.NEAREST if tile.width < SMALLEST_TILE else Image.Resampling.BICUBIC
            sheet.paste(tile.resize((side, side), resample), (x, y))
            for line, text in enumerate(lines):
                draw.text((x + 4, y + side + 2 + 18 * line), _shortened(text, side // 7), fill="black", font=font)
    return sheet


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
