"""How long a test would take, from a few batches of it."""

import time
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from featinv_pl.evaluation.results import aligned

BATCHES = 3


class Plan(Callback):
    """Times a few batches of the first source, and estimates all sources from them. Writes nothing."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.start = 0.0
        self.timed: list[tuple[float, int]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the sizes of all sources, and keep the first."""
        sources = cast(Any, trainer).datamodule.test
        self.sizes = {name: len(shards) for name, shards in sources.items()}
        for name in list(sources)[1:]:
            del sources[name]

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Stop it when the result is there."""
        outputs["logits"].cpu()
        self.timed.append((time.perf_counter() - self.start, len(batch["key"])))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the estimate."""
        timed = self.timed[1:] or self.timed  # the first batch warms up
        seconds = sum(time for time, _ in timed) / sum(samples for _, samples in timed) / trainer.world_size
        rows = [[name, str(size), f"{size * seconds / 3600:.2g}"] for name, size in self.sizes.items()]
        total = sum(self.sizes.values())
        rows.append(["all", str(total), f"{total * seconds / 3600:.2g}"])
        if trainer.is_global_zero:
            print("\n" + aligned([["source", "samples", "hours"], *rows]))
            print(f"From {len(timed)} batches at {seconds:.3g} s a sample, on {trainer.world_size} processes.")
