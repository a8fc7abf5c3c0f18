"""Steps of training: from the authors' configuration to ours, one saving after the other."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from bench import machine
from bench.memory import Shapes, activations
from featinv_pl.__main__ import run
from featinv_pl.tasks.inversion import FeatureInversion

CONFIGS = Path(__file__).parent
SAVINGS = {
    "authors": "as the authors train",
    "cached": "features, latents and prompts stored",
    "frozen": "no gradients of the UNet's weights",
    "kept": "activations kept, not computed again",
    "fused": "fused AdamW",
    "bf16": "bf16, with fp32 weights of what trains",
}
ON_GPU = {"channels-last": "channels last", "batch": "batches of 64", "compiled": "compiled"}
AGAIN = {"again": "the line of bf16, activations computed again"}
NAMES = {**SAVINGS, **(ON_GPU if machine.GPU else {}), **AGAIN}
SMALL, LARGE = 1 << 18, 1 << 25  # blocks that glibc gives back where memory is measured, and time
RECIPES = {"12gb": ("again", 8), "24gb": ("bf16", 16), "80gb": ("bf16", 128), "the authors'": ("fused", 8)}
"""Of experiments/imagenet/memory and train: a configuration that holds as much, and samples at a time."""


class Stopwatch(Callback):
    """Times steps, and counts operations of the first, which is not timed."""

    seconds: ClassVar[list[float]] = []
    peak: ClassVar[float] = 0.0
    flops: ClassVar[int] = 0
    state: ClassVar[int] = 0
    shapes: ClassVar[Shapes]
    graphs: ClassVar[int] = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the run before."""
        Stopwatch.seconds = []
        torch._dynamo.utils.counters.clear()
        machine.start_peak()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin."""
        self.count = batch_idx == 0 and pl_module.inverter.prior.unet._compiled_call_impl is None  # type: ignore[union-attr]
        if self.count:
            self.counter = FlopCounterMode(display=False).__enter__()
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
        Stopwatch.peak, Stopwatch.state = machine.peak(), state(pl_module, trainer.precision != "32-true")
        Stopwatch.shapes = Shapes.of(cast(FeatureInversion, pl_module))
        Stopwatch.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]


def state(model: LightningModule, mixed: bool) -> int:
    """Bytes that training holds besides activations.

    Weights, gradients and AdamW's two moments of what trains, and in mixed precision a copy of these weights in bf16,
    which the graph keeps.
    """
    weights = sum(weight.nbytes for weight in model.parameters())
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    return weights + 3 * trained + (trained // 2 if mixed else 0)


@dataclass
class Configuration:
    """What was measured of one.

    Attributes:
        name: Its file.
        batch_size: Samples per step.
        seconds: Of steps.
        peak: GiB.
        flops: Of one sample.
        state: Bytes held besides.
        graphs: Compiled ones.
    """

    name: str
    batch_size: int
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0
    flops: float = 0.0
    state: int = 0
    graphs: int = 0

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.batch_size / median(self.seconds)


def measure(model: list[str], rounds: int, steps: int) -> tuple[list[Configuration], dict[str, float]]:
    """Train a few steps with each configuration in turn, several times over, and before that once for the memory.

    Args:
        model: Options of all configurations, such as a smaller model.
        rounds: How often.
        steps: Timed steps of each round.

    Returns:
        The configurations with their figures, and the rates of plain products in between.
    """
    first = 8 if machine.GPU else 1
    configurations = [Configuration(name, 64 if name in ("batch", "compiled") else first) for name in NAMES]
    if not machine.GPU:  # whose own allocator knows what is needed
        machine.give_back_from(SMALL)
        for one in configurations:
            _train(one, model, 1)
            one.peak = Stopwatch.peak
        machine.give_back_from(LARGE)
    rates = []
    for _ in range(rounds):
        rates.append(machine.product_rates())
        for one in configurations:
            _train(one, model, steps)
            one.seconds += Stopwatch.seconds
            if machine.GPU:
                one.peak = Stopwatch.peak
            one.state, one.graphs = Stopwatch.state, Stopwatch.graphs
            if one.name != "compiled":  # the counters would be compiled, too
                one.flops = Stopwatch.flops / one.batch_size
            else:
                one.flops = configurations[-3].flops
    return configurations, machine.medians(rates)


def _train(one: Configuration, model: list[str], steps: int) -> None:
    """Take so many steps after a first one that is not timed."""
    own = [f"--trainer.max_steps={steps + 1}", f"--data.batch_size={one.batch_size}"]
    run(["fit", *(f"--config={CONFIGS / name}.yaml" for name in _files(one.name)), *model, *own])


def _files(name: str) -> list[str]:
    """A configuration's file and those that it lies over."""
    names = [*SAVINGS, *ON_GPU]
    return [*SAVINGS, name] if name in AGAIN else names[: names.index(name) + 1]


def recipe_memory(configurations: list[Configuration]) -> dict[str, float]:
    """GiB that the recipes for GPUs of several sizes hold: computed, without what kernels use in between."""
    state = {one.name: one.state for one in configurations}
    of_sample = {
        name: activations(Stopwatch.shapes, mixed=name != "fused", again=name in AGAIN) for name, _ in RECIPES.values()
    }
    sums = {
        f"{recipe}: batches of {batch_size}": state[name] + batch_size * of_sample[name]
        for recipe, (name, batch_size) in RECIPES.items()
    }
    return {
        **{f"a sample, as in {name}.yaml": size / machine.GIB for name, size in of_sample.items()},
        **{recipe: size / machine.GIB for recipe, size in sums.items()},
    }
