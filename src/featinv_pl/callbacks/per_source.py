"""Scores for each source, with the floor and the ceiling beside every figure."""

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from featinv_pl.callbacks.evaluation import EvaluationCallback
from featinv_pl.types import Batch, Inversion

Key = Literal["features", "logits", "images", "labels"]
ARMS = ("", "_floor", "_ceiling")


class PerSource(EvaluationCallback):
    """Feeds one metric for every source and logs it as `<source>/<score>`.

    Beside each score stand two references, computed by the same metric on the same images:

    * `<score>_floor`: each original against another one, that before it in its source. Sources are
      stored in random order, so this is a random other image.
    * `<score>_ceiling`: the originals through the prior's autoencoder alone.

    `cosine_calibrated` is where the cosine lies between the two, (c - floor) / (ceiling - floor).
    A source `a/b/c` also counts for `a/b` and `a`.

    Args:
        metric: Any torchmetrics metric whose result is a dictionary of scores.
        key: What the metric compares: this entry of reconstruction and original.
        target: What of the original it is compared with, if that is another entry, such as `labels`.
    """

    def __init__(self, metric: Metric, key: Key, target: Key | None = None) -> None:
        self.template = metric
        self.key, self.target = key, target or key
        self.metrics: dict[str, dict[str, Metric]] = {}
        self.previous: dict[str, Tensor] = {}

    def start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make metrics for every source of the stage."""
        # All metrics exist on every rank from the start: `compute` waits for all ranks, and one that
        # saw no sample of a source must take part.
        sources = cast(Any, trainer).datamodule.sources(stage)
        levels = sorted({level for source in sources for level in _levels(source)})
        self.metrics = {level: {arm: self.template.clone().to(pl_module.device) for arm in ARMS} for level in levels}
        self.previous = {}

    def see(self, batch: Batch, outputs: Inversion) -> None:
        """Feed the metrics of the sources in a batch."""
        originals = cast(Mapping[str, Tensor], batch)
        reconstructions = cast(Mapping[str, Tensor], outputs)[self.key]
        ceilings = cast(Mapping[str, Tensor], outputs["ceiling"])[self.key]
        for source in dict.fromkeys(batch["source"]):
            rows = [row for row, name in enumerate(batch["source"]) if name == source]
            target, images = originals[self.target][rows], originals[self.key][rows]
            self._feed(source, "", reconstructions[rows], target)
            self._feed(source, "_ceiling", ceilings[rows], target)
            others = torch.cat([self.previous[source], images[:-1]]) if source in self.previous else images[:-1]
            self._feed(source, "_floor", others, target[len(target) - len(others) :])
            self.previous[source] = images[-1:]

    def _feed(self, source: str, arm: str, preds: Tensor, target: Tensor) -> None:
        if len(preds):
            for level in _levels(source):
                self.metrics[level][arm].update(preds, target)

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log all scores."""
        pl_module.log_dict(self.scores())

    def scores(self) -> dict[str, Tensor]:
        """All scores so far; those of a source that has no sample are left out."""
        scores: dict[str, Tensor] = {}
        for source, arms in self.metrics.items():
            for arm, metric in arms.items():
                scores |= {f"{source}/{name}{arm}": value for name, value in metric.compute().items()}
            name = f"{source}/cosine"
            if name in scores:
                floor, ceiling = scores[f"{name}_floor"], scores[f"{name}_ceiling"]
                scores[f"{name}_calibrated"] = (scores[name] - floor) / (ceiling - floor)
        return {name: value for name, value in scores.items() if value.isfinite()}


def _levels(source: str) -> list[str]:
    """The source and the groups it belongs to: `a/b/c`, `a/b`, `a`."""
    parts = source.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]
