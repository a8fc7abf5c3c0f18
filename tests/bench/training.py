"""Steps of training: from the authors' configuration to ours, one saving after the other."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from bench import machine
from featinv_pl.__main__ import run

CONFIGS = Path(__file__).parents[2] / "experiments" / "bench"
SAVINGS = {
    "authors": "as the authors train",
    "cached": "features, latents and prompts stored",
    "frozen": "no gradients of the UNet's weights",
    "kept": "activations kept, not computed again",
    "fused": "fused AdamW",
    "bf16": "bf16, with fp32 weights of what trains",
}
ON_GPU = {"channels-last": "channels last", "batch": "batches of 64", "compiled": "compiled"}


class Stopwatch(Callback):
    """Times steps, and counts the operations of the first, which is not timed."""

    seconds: ClassVar[list[float]] = []
    peak: ClassVar[float] = 0.0
    flops: ClassVar[int] = 0
    graphs: ClassVar[int] = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the run before."""
        Stopwatch.seconds = []
        torch._dynamo.utils.counters.clear()
        machine.start_peak()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin."""
        self.counter = FlopCounterMode(display=False)
        self.count = batch_idx == 0 and pl_module.prior.unet._compiled_call_impl is None  # type: ignore[union-attr]
        if self.count:
            self.counter.__enter__()
        self.start = machine.now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End."""
        taken = machine.now() - self.start
        if self.count:
            self.counter.__exit__(None, None, None)
            Stopwatch.flops = self.counter.get_total_flops()
        if batch_idx > 0:
            Stopwatch.seconds.append(taken)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the memory, and how often something was compiled."""
        Stopwatch.peak = machine.peak()
        Stopwatch.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]


@dataclass
class Configuration:
    """What was measured of one.

    Attributes:
        name: Its file.
        batch_size: Samples per step.
        seconds: Of steps.
        peak: GiB.
        flops: Of one sample.
        graphs: Compiled ones.
    """

    name: str
    batch_size: int
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0
    flops: float = 0.0
    graphs: int = 0

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.batch_size / median(self.seconds)


def measure(model: list[str], rounds: int, steps: int) -> list[Configuration]:
    """Train a few steps with each configuration in turn, several times over.

    Args:
        model: Options of all configurations, such as a smaller model.
        rounds: How often.
        steps: Timed steps of each round.
    """
    names = [*SAVINGS, *(ON_GPU if machine.GPU else {})]
    first = 8 if machine.GPU else 1
    configurations = [Configuration(name, 64 if name in ("batch", "compiled") else first) for name in names]
    for _ in range(rounds):
        for number, one in enumerate(configurations):
            files = [f"--config={CONFIGS / name}.yaml" for name in names[: number + 1]]
            own = [f"--trainer.max_steps={steps + 1}", f"--data.batch_size={one.batch_size}"]
            run(["fit", *files, *model, *own])
            one.seconds += Stopwatch.seconds
            one.peak, one.graphs = Stopwatch.peak, Stopwatch.graphs
            one.flops = (Stopwatch.flops if one.name != "compiled" else configurations[0].flops) / one.batch_size
    return configurations
