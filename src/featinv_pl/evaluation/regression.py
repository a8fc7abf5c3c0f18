"""A baseline that learns from the training shards: a regression of latents on feature maps."""

import hashlib
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from featinv_pl.data.order import Batches, ShuffledBatches
from featinv_pl.data.shards.manifest import seal
from featinv_pl.data.shards.reader import BatchReader, ShardSet
from featinv_pl.data.workers import loader
from featinv_pl.errors import UserError
from featinv_pl.files import write_bytes
from featinv_pl.nets.regression import LatentRegression, fit
from featinv_pl.runtime.progress import progress
from featinv_pl.runtime.ranks import agree, of_all_ranks
from featinv_pl.types import Batch, Observation

STEPS, EPOCHS, BATCH_SIZE = 4000, 50, 64  # whichever of steps and epochs ends first
FILE, IDENTITY = "regression.safetensors", "identity"


class Regression:
    """Decodes the latents that a regression predicts from a feature map.

    The regression is fitted to the training shards, in an order that the seed determines, and kept in
    `<default_root_dir>/regression.safetensors` for further tests with the same shards and seed. Each rank fits it,
    so that none waits for another for long, and takes the weights of the first.

    Raises:
        UserError: The shards cannot be read, or the fit diverges.
    """

    def __init__(self, trainer: Trainer, inverter: Any, training: ShardSet, num_workers: int) -> None:
        self.trainer, self.inverter, self.training, self.num_workers = trainer, inverter, training, num_workers
        seed, path = torch.initial_seed(), Path(trainer.default_root_dir) / FILE
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = inverter.prior.latent_grid(inverter.image_size)
            self.network = LatentRegression(inverter.classifier.feature_shape, shape).to(inverter.device)
        self.order = ShuffledBatches(training.shard_sizes, min(BATCH_SIZE, len(training)), 0, 1, seed)
        self.steps = min(STEPS, EPOCHS * len(self.order))
        settings = f"{seal(training.manifest)} {self.network} seed {seed}, {self.steps} steps of {BATCH_SIZE}"
        identity = hashlib.sha256(settings.encode()).hexdigest()
        weights = _read(path, identity)
        if not all(of_all_ranks(weights is not None)):
            weights = trainer.strategy.broadcast(agree(self._fit))
            if trainer.is_global_zero:
                write_bytes(path, save(weights, {IDENTITY: identity}))
        assert weights is not None
        self.network.load_state_dict(weights)
        self.network.eval()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Observation:
        """Reconstruct a batch."""
        images = self.inverter.prior.autoencoder.decode(self.network(batch["features"]))
        observation: Observation = self.inverter.classifier.classify(images)
        return observation

    def _fit(self) -> dict[str, Tensor]:
        """The fitted weights, on the CPU."""
        with torch.inference_mode(False), torch.enable_grad():
            error = fit(self.network, self._batches(), self.steps)
        if not isfinite(error):
            raise UserError(f"its error after {self.steps} steps is {error}")
        return {name: value.cpu() for name, value in self.network.state_dict().items()}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Feature maps and mean latents of one epoch after another."""
        order: list[Sequence[int]] = []
        while len(order) < self.steps:
            order += self.order
            self.order.set_epoch(self.order.epoch + 1)
        reader, batches = BatchReader(self.training), Batches(order[: self.steps])
        read, device = loader(reader, batches, self.num_workers, again=False), self.inverter.device
        for batch in progress(self.trainer, "regression", "step", read):
            moments = batch["moments"].to(device).float()
            mean = self.inverter.prior.autoencoder.sample(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
            yield batch["features"].to(device).float(), mean


def _read(path: Path, identity: str) -> dict[str, Tensor] | None:
    """The weights in a file, if they have that identity."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            same = (file.metadata() or {}).get(IDENTITY) == identity
            return {name: file.get_tensor(name) for name in names} if same else None
    except (OSError, SafetensorError):  # missing or damaged: fit again
        return None
