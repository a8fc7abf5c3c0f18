"""Pictures: originals above their reconstructions."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from featinv_pl.callbacks.evaluation import EvaluationCallback
from featinv_pl.callbacks.files import write_bytes
from featinv_pl.types import Batch, Inversion, to_uint8

PICTURES = "pictures"
FACTS_FILE = "tiles.json"
STRIPS = ("original", "autoencoder", "reconstruction")
FACTS = ("label", "prediction", "reconstruction_prediction", "cosine")


class ReconstructionGrid(EvaluationCallback):
    """Writes and logs the first images of every source: original, autoencoder alone, reconstruction.

    `<default_root_dir>/pictures/<source>/` gets one strip of tiles per row (`original.png`,
    `autoencoder.png`, `reconstruction.png`) and `tiles.json` with labels, predicted classes and
    cosines. Loggers that take images get the three strips as one picture.

    Args:
        num_images: Tiles per source.
    """

    def __init__(self, num_images: int = 12) -> None:
        self.num_images = num_images
        self.rows: dict[str, dict[str, list[Any]]] = {}

    def start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the images of the last evaluation."""
        self.rows = {}

    def see(self, batch: Batch, outputs: Inversion) -> None:
        """Keep the first images of each source."""
        cosines = cosine_similarity(outputs["features"], batch["features"]).mean((1, 2))
        for row, source in enumerate(batch["source"]):
            rows = self.rows.setdefault(source, {name: [] for name in (*STRIPS, *FACTS)})
            if len(rows["cosine"]) == self.num_images:
                continue
            rows["original"].append(to_uint8(batch["images"][row]).cpu())
            rows["autoencoder"].append(to_uint8(outputs["ceiling"]["images"][row]).cpu())
            rows["reconstruction"].append(to_uint8(outputs["images"][row]).cpu())
            rows["label"].append(int(batch["labels"][row]))
            rows["prediction"].append(int(batch["logits"][row].argmax()))
            rows["reconstruction_prediction"].append(int(outputs["logits"][row].argmax()))
            rows["cosine"].append(round(float(cosines[row]), 4))

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and log the pictures."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        for source, rows in self.rows.items():
            folder = Path(trainer.default_root_dir) / PICTURES / source
            strips = {name: _strip(rows[name]) for name in STRIPS}
            for name, strip in strips.items():
                write_bytes(folder / f"{name}.png", _png(strip))
            facts = {name: rows[name] for name in FACTS}
            write_bytes(folder / FACTS_FILE, json.dumps(facts).encode())
            picture = np.concatenate(list(strips.values()))
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    caption = f"{source}: {', '.join(STRIPS)}"
                    logger.log_image(f"reconstructions/{source}", [picture], caption=[caption])


def _strip(tiles: list[Tensor]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Tiles (3, H, W) side by side, as (H, n * W, 3) bytes."""
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = torch.cat(tiles, dim=2).permute(1, 2, 0).numpy()
    return pixels


def _png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
