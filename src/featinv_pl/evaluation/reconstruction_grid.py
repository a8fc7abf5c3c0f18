"""Pictures: originals above their reconstructions."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.errors import UserError
from featinv_pl.evaluation.arms import CEILING, INVERSION, ORIGINAL, label
from featinv_pl.evaluation.loggers import Pixels, last_step, log_picture
from featinv_pl.evaluation.sets import EvaluationCallback, results_root
from featinv_pl.files import write_bytes
from featinv_pl.nets.frozen import digest
from featinv_pl.types import Batch, Reconstruction, predicted, to_uint8

PICTURES = "pictures"
FACTS_FILE = "tiles.json"
FIRST, EXTREMES = "first", "extremes"
POOL = 128
FACTS = ("label", "prediction", "reconstruction_prediction", "cosine")


@dataclass(frozen=True)
class Tile:
    """One image in all its rows, (3, H, W) bytes each, and what is known of it."""

    images: dict[str, Tensor]
    facts: dict[str, Any]


class ReconstructionGrid(EvaluationCallback):
    """Writes and logs images of every source: original, autoencoder alone, reconstruction.

    `<default_root_dir>/pictures/<source>/first/` gets one strip of tiles per row (`original.png`,
    `autoencoder.png`, `reconstruction.png`, and one for each further sampler) with the first images,
    which are the same for every inverter, and `tiles.json` with labels, predicted classes, cosines, and the
    digest of the weights that were tested.
    `extremes/` gets the same of the best, the median and the worst images by cosine among the first
    128. Sources are stored in random order, so the first are a fair sample. Loggers that take pictures
    get the strips as one.

    Args:
        num_images: Tiles per source.
    """

    def __init__(self, num_images: int = 12) -> None:
        if not 1 <= num_images <= POOL:
            raise UserError(f"--trainer.callbacks.num_images must be 1 to {POOL}, and is {num_images}.")
        self.num_images = num_images
        self.folder = Path(PICTURES)
        self.tiles: list[Tile] = []
        self.source: str | None = None
        self.loggers: list[Logger] = []
        self.step = 0
        self.checkpoint: str | None = None

    def start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the images of the last evaluation."""
        self.folder = results_root(trainer) / PICTURES
        self.checkpoint = digest(cast(Any, pl_module).inverter.control) if trainer.state.fn != "fit" else None
        self.loggers, self.step = trainer.loggers, last_step(trainer)
        self.tiles, self.source = [], None

    def update(self, batch: Batch, outputs: Reconstruction) -> None:
        """Keep the first images of a source, and show those of the source before it."""
        if batch["source"][0] != self.source:
            self._show()
            self.source = batch["source"][0]
        rows = range(min(len(batch["key"]), POOL - len(self.tiles)))
        cosines = cosine_similarity(outputs["features"], batch["features"]).mean((1, 2)).tolist()
        images = {label(ORIGINAL): batch["images"], label(CEILING): outputs["ceiling"]["images"]}
        images[label(INVERSION)] = outputs["images"]
        images |= {name: observation["images"] for name, observation in outputs.get("arms", {}).items()}
        strips = {name: to_uint8(item[: len(rows)]).cpu() for name, item in images.items()}
        classes = [
            ["none" if index < 0 else index for index in predicted(item).tolist()]
            for item in (batch["logits"], outputs["logits"])
        ]
        labels = batch["labels"].tolist()
        self.tiles += [
            Tile(
                images={name: strip[row] for name, strip in strips.items()},
                facts=dict(
                    zip(FACTS, (labels[row], classes[0][row], classes[1][row], round(cosines[row], 4)), strict=True)
                ),
            )
            for row in rows
        ]

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last source."""
        self._show()

    @rank_zero_only
    def _show(self) -> None:
        """Write and log the pictures of a source."""
        if self.source is None:
            return
        for name, tiles in ((FIRST, self.tiles[: self.num_images]), (EXTREMES, self._extremes())):
            folder = self.folder / self.source / name
            strips = {row: _strip([tile.images[row] for tile in tiles]) for row in tiles[0].images}
            for row, strip in strips.items():
                write_bytes(folder / f"{row}.png", _png(strip))
            facts = {fact: [tile.facts[fact] for tile in tiles] for fact in FACTS}
            write_bytes(folder / FACTS_FILE, json.dumps({"checkpoint": self.checkpoint, **facts}).encode())
            picture = np.concatenate(list(strips.values()))
            caption = f"{self.source}, {name}, from top to bottom: {', '.join(strips)}"
            for logger in self.loggers:
                log_picture(logger, f"reconstructions/{self.source}/{name}", picture, caption, self.step)
        self.tiles, self.source = [], None

    def _extremes(self) -> list[Tile]:
        """A third each of the best, the median and the worst; all, from best to worst, if they are few."""
        ranked = sorted(self.tiles, key=lambda tile: -tile.facts["cosine"])
        third = self.num_images // 3
        if len(ranked) <= 3 * third or not third:
            return ranked[: self.num_images]
        middle = (len(ranked) - third) // 2
        return ranked[:third] + ranked[middle : middle + third] + ranked[-third:]


def _strip(tiles: list[Tensor]) -> Pixels:
    """Tiles (3, H, W) side by side, as (H, n * W, 3) bytes."""
    pixels: Pixels = torch.cat(tiles, dim=2).permute(1, 2, 0).numpy()
    return pixels


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
