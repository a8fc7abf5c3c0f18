"""Keeps what has been drawn, so that an interrupted test goes on with the same command."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from featinv_pl.files import write_bytes
from featinv_pl.inverter.identity import hashed, sampling
from featinv_pl.types import Batch, Reconstruction, to_uint8

DRAWN = "drawn"


class DrawnImages(Callback):
    """Stores the reconstructions of `test` as they are drawn, and hands them to a later test.

    A stored image is found by all that decides it: weights, prompts, noise schedule, settings and precision
    of the model, the sampler, the seed, the sample's key and its feature map. So an interrupted test resumes
    with the same command, at other batch sizes and on other numbers of processes too; a test with other
    metrics, held-out classifiers or pictures reuses the reconstructions; and a change of the model or of the
    data is never overlooked. Everything else is computed again, which costs little.

    `<default_root_dir>/drawn/` gets one file of bytes per batch. It may be removed at any time.
    """

    def __init__(self) -> None:
        self.folder = Path(DRAWN)
        self.models: dict[str, str] = {}
        self.files: dict[str, Path] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look what there is."""
        module: Any = pl_module
        self.folder = Path(trainer.default_root_dir) / DRAWN
        samplers = {"": module.inverter.sampler, **module.arms}
        model = {**module.inverter.identity(), **sampling(module.inverter, str(trainer.precision))}
        self.models = {arm: hashed({**model, "sampler": asdict(sampler)}) for arm, sampler in samplers.items()}
        self.files = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self.files |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError):
                print(f"'{path}' cannot be read; its images are drawn again.")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hand over what is there."""
        batch["drawn"] = {
            arm: {row: self._load(name) for row, name in enumerate(self._names(arm, batch)) if name in self.files}
            for arm in self.models
        }

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store what is new."""
        inversion: Reconstruction = outputs
        new: dict[str, Tensor] = {}
        for arm, observation in {"": inversion, **inversion.get("arms", {})}.items():
            whole = observation["features"].flatten(1).isfinite().all(1).tolist()
            new |= {
                name: to_uint8(observation["images"][row]).cpu().contiguous()
                for row, name in enumerate(self._names(arm, batch))
                if row not in batch["drawn"][arm] and whole[row]
            }
        if new:
            write_bytes(self.folder / f"{next(iter(new))}.safetensors", save(new))

    def _load(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as file:
            image: Tensor = file.get_tensor(name)
            return image

    def _names(self, arm: str, batch: Batch) -> list[str]:
        maps = batch["features"].cpu().contiguous().numpy()
        return [
            hashlib.blake2b(f"{self.models[arm]} {key}".encode() + maps[row].tobytes(), digest_size=16).hexdigest()
            for row, key in enumerate(batch["key"])
        ]
