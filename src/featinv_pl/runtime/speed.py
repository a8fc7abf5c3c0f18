"""How fast training is, and how much memory it takes."""

import time
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Speed(Callback):
    """Logs `train/samples_per_second`, and on a GPU `train/peak_memory_gib`.

    Samples are those of all processes, per second of training alone: validation does not count.
    Lightning's ThroughputMonitor would wait for the GPU after every batch, which this does not.
    """

    def __init__(self) -> None:
        self.samples = self.logged = 0
        self.start = self.paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.samples, self.logged, self.start = 0, trainer.global_step, time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start += time.perf_counter() - self.paused

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch["key"])
        interval, step = cast(Any, trainer).log_every_n_steps, trainer.global_step
        if interval and step % interval == 0 and step != self.logged:  # of several batches that make a step, the last
            now = time.perf_counter()
            rate = self.samples * trainer.world_size / (now - self.start)
            pl_module.log("train/samples_per_second", rate, batch_size=1)
            if pl_module.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
                pl_module.log("train/peak_memory_gib", peak, batch_size=1)
            self.samples, self.logged, self.start = 0, step, now
