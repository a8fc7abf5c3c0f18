"""Pictures of each test set: originals above their reconstructions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.evaluation.loggers import Pixels, log_picture
from featinv_pl.evaluation.methods import CEILING, INVERSION, ORIGINAL, label
from featinv_pl.evaluation.reconstructions import Reconstruction
from featinv_pl.files import write_bytes
from featinv_pl.pages.pictures import picture_png
from featinv_pl.types import Batch, predicted, to_uint8

PICTURES = "pictures"
FACTS_FILE = "tiles.json"
FIRST, EXTREMES = "first", "extremes"
POOL = 128
FACTS = ("label", "prediction", "reconstruction_prediction", "cosine")


class Pictures:
    """Writes and logs images of every test set: original, autoencoder, and a reconstruction by each sampler.

    `pictures/<test set>/first/` gets one strip of tiles per method with the first images, which are the same for every
    inverter, and `tiles.json` with their facts and the digest of the weights (`checkpoint`). `extremes/` gets the best,
    the median and the worst images by cosine among the first 128; test sets are stored in random order, so these are a
    fair sample. Loggers get the strips as one picture.
    """

    def __init__(
        self,
        num_images: int,
        samplers: Sequence[str],
        root: Path,
        checkpoint: str | None,
        loggers: Sequence[Logger],
        step: int,
    ) -> None:
        self.num_images, self.folder, self.checkpoint = num_images, root / PICTURES, checkpoint
        self.rows = {method: label(method) for method in (ORIGINAL, CEILING, INVERSION, *samplers)}
        self.loggers, self.step = loggers, step
        self.test_set: str | None = None
        self._forget()

    def _forget(self) -> None:
        self.tiles: dict[str, list[Tensor]] = {name: [] for name in self.rows.values()}
        self.facts: dict[str, list[Any]] = {name: [] for name in FACTS}

    def update(self, batch: Batch, made: Mapping[str, Reconstruction]) -> None:
        """Keep the first images of a test set, and show those of the set before it."""
        if batch["source"][0] != self.test_set:
            self.show()
            self.test_set = batch["source"][0]
        left = POOL - len(self.facts["cosine"])
        for method, name in self.rows.items():
            self.tiles[name] += to_uint8(made[method]["images"][:left]).cpu().unbind()
        cosines = cosine_similarity(made[INVERSION]["features"], batch["features"]).mean((1, 2)).tolist()
        classes = [
            ["none" if index < 0 else index for index in predicted(item["logits"]).tolist()]
            for item in (batch, made[INVERSION])
        ]
        facts = (batch["labels"].tolist(), *classes, [round(cosine, 4) for cosine in cosines])
        for name, values in zip(FACTS, facts, strict=True):
            self.facts[name] += values[:left]

    @rank_zero_only
    def show(self) -> None:
        """Write and log the pictures of the last test set."""
        if self.test_set is None:
            return
        first = list(range(len(self.facts["cosine"])))[: self.num_images]
        for name, chosen in ((FIRST, first), (EXTREMES, self._extremes())):
            folder = self.folder / self.test_set / name
            strips = {row: _strip([tiles[index] for index in chosen]) for row, tiles in self.tiles.items()}
            for row, strip in strips.items():
                write_bytes(folder / f"{row}.png", picture_png(Image.fromarray(strip)))
            facts = {fact: [values[index] for index in chosen] for fact, values in self.facts.items()}
            write_bytes(folder / FACTS_FILE, json.dumps({"checkpoint": self.checkpoint, **facts}).encode())
            picture = np.concatenate(list(strips.values()))
            caption = f"{self.test_set}, {name}, from top to bottom: {', '.join(strips)}"
            for logger in self.loggers:
                log_picture(logger, f"reconstructions/{self.test_set}/{name}", picture, caption, self.step)
        self.test_set = None
        self._forget()

    def _extremes(self) -> list[int]:
        """A third each of the best, the median and the worst; if they are few, all from best to worst."""
        cosines, third = self.facts["cosine"], self.num_images // 3
        ranked = sorted(range(len(cosines)), key=lambda index: -cosines[index])
        if len(ranked) <= 3 * third or not third:
            return ranked[: self.num_images]
        middle = (len(ranked) - third) // 2
        return ranked[:third] + ranked[middle : middle + third] + ranked[-third:]


def _strip(tiles: Sequence[Tensor]) -> Pixels:
    """Tiles (3, H, W) side by side, as (H, n * W, 3) bytes."""
    pixels: Pixels = torch.cat(list(tiles), dim=2).permute(1, 2, 0).numpy()
    return pixels
