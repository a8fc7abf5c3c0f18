"""The demo's inverter: where its training spends its time, and whether the fast configuration learns the same."""

from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from featinv_pl.__main__ import run

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "experiments" / "digits" / "spatial.yaml"
PROFILE = ROOT / "experiments" / "bench" / "profile.yaml"
PRECISIONS = {"plain fp32": ["32-true", "false"], "fast: bf16, fused": ["bf16-mixed", "true"]}
SMOOTHING = 25  # steps


class Curve(Callback):
    """Keeps the loss of every step, and where the profiler saw the time go."""

    losses: ClassVar[list[Tensor]] = []
    share: ClassVar[float] = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the run before."""
        Curve.losses = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss."""
        Curve.losses.append(outputs["loss"].detach())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the share of forward, backward and optimizer in the epochs, without validation."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, SimpleProfiler):
            seconds = {name: sum(taken) for name, taken in profiler.recorded_durations.items()}
            step = sum(taken for name, taken in seconds.items() if name.endswith(".optimizer_step"))
            validation = sum(taken for name, taken in seconds.items() if name.endswith(".validation_step"))
            Curve.share = step / (seconds["run_training_epoch"] - validation)


def share(config: Path, options: list[str]) -> float:
    """The share of a training's time within forward, backward and optimizer.

    Lightning's optimizer step calls the other two.
    """
    own = ["--trainer.profiler=SimpleProfiler", "--trainer.profiler.filename=profile"]  # a long table, to a file
    own += ["--trainer.callbacks+=bench.digits.Curve", *options]
    run(["fit", "--config", str(config), "--config", str(PROFILE), *own])
    return Curve.share


def curves(config: Path, steps: int, seeds: list[int], options: list[str]) -> dict[str, NDArray[np.float64]]:
    """The losses (seeds, steps) of both precisions, which share data, noise and timesteps of each seed."""
    found: dict[str, list[list[float]]] = {name: [] for name in PRECISIONS}
    for seed in seeds:
        for name, (precision, fused) in PRECISIONS.items():
            own = [f"--seed_everything={seed}", f"--trainer.max_steps={steps}", f"--trainer.precision={precision}"]
            own += [
                "--trainer.callbacks+=bench.digits.Curve",
                "--trainer.profiler=null",
                "--trainer.limit_val_batches=0",
            ]
            own += [f"--model.optimizer.fused={fused}"]
            run(["fit", "--config", str(config), "--config", str(PROFILE), *own, *options])
            found[name].append([float(loss) for loss in Curve.losses])
    return {name: np.array(losses) for name, losses in found.items()}


def compared(losses: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """The end of the curves: how far the precisions are from each other, and the seeds."""
    plain, fast = (curve[:, -len(curve[0]) // 3 :].mean(1) for curve in losses.values())
    return {
        "plain": mean(plain),
        "fast": mean(fast),
        "difference": float(np.abs(fast - plain).max()),
        "between seeds": stdev(plain) if len(plain) > 1 else 0.0,
    }


def plot(losses: dict[str, NDArray[np.float64]], path: Path) -> None:
    """Draw the curves, averaged over a few steps."""
    figure = Figure((6, 3.2), layout="constrained")
    axes = figure.subplots()
    kernel = np.ones(SMOOTHING) / SMOOTHING
    for (name, seeds), colour, style in zip(losses.items(), ("tab:grey", "tab:red"), ("-", ":"), strict=True):
        for number, seed in enumerate(seeds):
            smooth = np.convolve(seed, kernel[: len(seed)], "valid")
            axes.plot(smooth, style, color=colour, linewidth=1.5, label=name if number == 0 else None)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
