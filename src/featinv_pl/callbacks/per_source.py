"""Scores for each source, with floor, ceiling and baselines beside every figure."""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from featinv_pl.arms import ARMS, CEILING, FLOOR, INVERSION, NEIGHBOUR, ORIGINAL, label
from featinv_pl.callbacks.evaluation import EvaluationCallback, results_root
from featinv_pl.callbacks.files import write_bytes
from featinv_pl.callbacks.media import last_step, log_picture, log_table
from featinv_pl.callbacks.plots import cosine_histograms, severity_curves
from featinv_pl.callbacks.provenance import evaluation
from featinv_pl.callbacks.references import Floor, Neighbours
from featinv_pl.callbacks.results import METRICS, Name, Results, aligned, column, samples_file, samples_path
from featinv_pl.errors import UserError
from featinv_pl.metrics.agreement import Agreement, LabelAccuracy
from featinv_pl.metrics.diversity import MapDiversity, PixelDiversity
from featinv_pl.metrics.frechet import FrechetDistance
from featinv_pl.metrics.kernel import KernelDistance
from featinv_pl.metrics.pixels import PerceptualDistance, PixelSimilarity
from featinv_pl.metrics.sample_metric import SampleMetric
from featinv_pl.metrics.similarity import MapSimilarity
from featinv_pl.metrics.weights import INCEPTION_FEATURES, Inception, Lpips, Weights
from featinv_pl.types import Batch, Inversion, Views

Network = TypeVar("Network", Inception, Lpips)

REPLICATES = 1000
CAPTIONS = {
    "scores": "with 95 % intervals",
    "severity": "scores against the severity of corruptions, with 95 % intervals",
    "histograms": "how the cosine is distributed over the samples of each source",
}


@dataclass(frozen=True)
class Eye:
    """A network that looks at images, and the metrics that compare what it sees.

    Attributes:
        prefix: Of the names of its scores.
        look: From images to views; None for the backbone, whose views travel with the batch.
        metrics: Makes new metrics: those of each sample, and those of whole sets.
    """

    prefix: str
    look: Callable[[Tensor], Mapping[str, Any]] | None
    metrics: Callable[[], list[Metric]]


@dataclass
class Tally:
    """What is known so far of one source, or of a group of sources.

    Attributes:
        source: Its name.
        metrics: By number of the eye and by arm.
        columns: The table of samples.
        left_out: Keys of samples that cannot be scored.
        floor: Partners for the floor; None where there are none.
        count: Samples that count, on all ranks.
    """

    source: str
    metrics: dict[tuple[int, str], list[Metric]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    floor: Floor | None = None
    count: int = 0

    def add(self, part: "Tally") -> None:
        """Add a source to a group."""
        for key, metrics in part.metrics.items():
            for metric, other in zip(self.metrics[key], metrics, strict=True):
                metric.merge_state(other)
        self.count += part.count


class PerSource(EvaluationCallback):
    """Scores every source, logs `<source>/<score>`, and writes the scores of `validate` and `test`.

    Beside each score of the inversion stand those of other arms, by the same metrics on the same images:

    * `<score>.floor`: another image of the source, chosen by key (not for distances between sets).
    * `<score>.ceiling`: the original through the prior's autoencoder alone.
    * `label@1.original`: the original itself, that is, the accuracy of the backbone.
    * `<score>.neighbour`: in `test`, the training image with the most similar map.
    * `<score>.<name>`: in `test`, what the sampler of that name has drawn (`--model.arms`).

    A source `a/b/c` also counts for `a/b` and `a`. `<default_root_dir>` gets `metrics.json` and
    `scores.csv` with all scores and their 95 % intervals, and `samples/<source>.parquet` with every
    sample; `plots/` shows them. What cannot be scored is left out and named; the rest is scored all the same.

    Args:
        clean: The source that corrupted ones are compared with.
        neighbours: Training samples to search for the nearest; 0 leaves that arm out.
        inception: The Inception weights of 2015, by which `fid` and `kid` are defined: a file, or
            `download` to fetch it once. By default it is used if torch has downloaded it before.
        alexnet: The AlexNet weights by which `lpips` is defined, likewise.
    """

    def __init__(
        self,
        clean: str = "clean",
        neighbours: int = 20_000,
        inception: Weights = None,
        alexnet: Weights = None,
    ) -> None:
        if neighbours < 0:
            raise UserError(f"--trainer.callbacks.neighbours must be at least 0, and is {neighbours}.")
        self.clean, self.limit, self.inception, self.alexnet = clean, neighbours, inception, alexnet
        self.results = Results()
        self.pending: list[str] = []
        self.open: Tally | None = None
        self.groups: dict[str, Tally] = {}
        self.neighbours: Neighbours | None = None
        self.eyes: list[Eye] = []

    def start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make everything new."""
        datamodule = cast(Any, trainer).datamodule
        self.results = Results()
        self.diverse = stage == "test" and cast(Any, pl_module).num_samples > 1
        self.drawn = [INVERSION, *(cast(Any, pl_module).arms if stage == "test" else [])]
        self.pending = list(datamodule.sources(stage))
        self.open, self.groups, self.neighbours = None, {}, None
        self.device = pl_module.device
        self.num_classes = cast(Any, pl_module).backbone.num_classes
        self.biased: dict[str, list[str]] = {}
        self.root = results_root(trainer)
        self.loggers, self.stage, self.step = trainer.loggers, stage, last_step(trainer)
        self.writes = trainer.state.fn != "fit" and trainer.is_global_zero
        self.results.provenance = evaluation(trainer, pl_module) if self.writes else None
        self.samples = datamodule.test if stage == "test" else {"val": datamodule.val}
        # In the middle of training an interval is not worth its time, and nothing is written.
        self.replicates = 0 if trainer.state.fn == "fit" else REPLICATES
        self.eyes = self._eyes(pl_module)
        for source in self.skipped if stage == "test" else []:
            self._note(f"{source}: left out, for it has fewer samples than there are processes")
        if stage == "test" and self.limit:
            self._find_training_maps(datamodule)

    def see(self, batch: Batch, outputs: Inversion) -> None:
        """Add a batch, all of one source."""
        while self.open is None or self.open.source != batch["source"][0]:
            self._next()
        tally = self.open
        arms = {INVERSION: cast(Views, outputs), CEILING: outputs["ceiling"], ORIGINAL: cast(Views, batch)}
        arms |= outputs.get("arms", {})
        if tally.floor is not None:
            arms[FLOOR] = tally.floor(batch)
        if self.neighbours is not None:
            arms[NEIGHBOUR] = self.neighbours(batch)
        arms, batch = self._finite(tally, arms, batch)
        if not batch["key"]:
            return
        columns = {
            "key": batch["key"],
            "label": batch["labels"].tolist(),
        }
        for number, eye in enumerate(self.eyes):
            target = {**batch, **eye.look(batch["images"])} if eye.look else batch
            for arm, views in arms.items():
                if (number, arm) not in tally.metrics:
                    continue
                preds = eye.look(views["images"]) if eye.look else views
                if "logits" in preds:
                    columns[column(f"{eye.prefix}predicted", arm)] = preds["logits"].argmax(1).tolist()
                for metric in tally.metrics[number, arm]:
                    ours, theirs = cast(Any, metric).reads
                    metric.update(cast(Any, preds)[ours], cast(Any, target)[theirs], batch["key"])
                    if isinstance(metric, SampleMetric):
                        names = (column(f"{eye.prefix}{name}", arm) for name in metric.names)
                        columns.update(zip(names, metric.latest.T.tolist(), strict=True))
        for name, values in columns.items():
            tally.columns.setdefault(name, []).extend(values)

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the last sources and log all scores."""
        while self.pending or self.open is not None:
            self._next()
        for name, sources in self.biased.items():
            self._note(
                f"{name} is biased upwards where there are no more samples than features, such as in {sources[0]}"
                + f" and {len(sources) - 1} others" * (len(sources) > 1)
            )
        self.results.derive(self.clean)
        scores = {str(name): score["value"] for name, score in self.results.scores.items()}
        if trainer.state.fn == "fit":
            pl_module.log_dict(scores)  # for ModelCheckpoint to monitor
        else:
            # Not through Lightning, which would print all of them, and with forked processes waits for ever to
            # hand so many back.
            for logger in trainer.loggers:
                logger.log_metrics(scores, self.step)

    def end(self) -> None:
        """Write the files, and show what matters most."""
        if self.writes:
            for name, data in self.results.files().items():
                write_bytes(self.root / name, data)
            print("\n" + aligned(self.results.table()))
            for note in self.results.notes:
                print(f"Note: {note}")
            self._picture()
            print(f"{len(self.results.scores)} scores in {self.root / METRICS}")

    def _picture(self) -> None:
        """Write the plots, and hand them to the loggers, beside the table."""
        title, whole = label(INVERSION), [name for name in self.results.counts if "/" not in name]
        plots = {"severity": severity_curves({title: self.results.document}, self.clean)}
        if whole:
            plots["histograms"] = cosine_histograms({title: self.root}, whole, self.results.counts)
        for name, png in plots.items():
            if png is not None:
                write_bytes(self.root / "plots" / f"{name}.png", png)
                pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
                for logger in self.loggers:
                    log_picture(logger, f"plots/{name}", pixels, CAPTIONS[name], self.step)
        for logger in self.loggers:
            log_table(logger, f"scores/{self.stage}", self.results.table(), CAPTIONS["scores"], self.step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave out sources with fewer samples than there are processes, which would wait for each other."""
        test = getattr(getattr(trainer, "datamodule", None), "test", None) if stage == "test" else None
        self.skipped = [name for name, shards in (test or {}).items() if len(shards) < trainer.world_size]
        if test and len(self.skipped) == len(test):
            raise UserError(f"--data.test: no source has a sample for each process: {', '.join(self.skipped)}.")
        for name in self.skipped:
            del cast(Any, test)[name]

    def _eyes(self, module: Any) -> list[Eye]:
        channels, name = module.backbone.feature_shape[0], network_name(module.backbone)

        def own() -> list[Metric]:
            return [
                *(kind(self.replicates) for kind in (MapSimilarity, Agreement, LabelAccuracy, PixelSimilarity)),
                FrechetDistance(channels, f"fd_{name}"),
                KernelDistance(channels, f"kd_{name}"),
            ]

        def judged() -> list[Metric]:
            return [MapSimilarity(self.replicates), Agreement(self.replicates)]

        eyes = [Eye("", None, own)]
        if self.replicates == 0:
            return eyes
        if module.judge is not None:
            eyes.append(Eye("judge_", module.judge.look, judged))
        inception = self._published("fid and kid", Inception, self.inception, "inception")
        if inception is not None:
            eyes.append(Eye("", lambda images: {"features": inception(images)}, _inception_distances))
        lpips = self._published("lpips", Lpips, self.alexnet, "alexnet")
        if lpips is not None:
            eyes.append(
                Eye("", lambda images: {"images": images}, lambda: [PerceptualDistance(lpips, self.replicates)])
            )
        return eyes

    def _published(self, scores: str, kind: type[Network], weights: Weights, option: str) -> Network | None:
        """A network of published weights, on all ranks or on none: some alone would wait for the others' scores."""
        network, error = None, ""
        try:
            network = kind(weights, f"PerSource.{option}").to(self.device)
        except UserError as reason:
            if isinstance(weights, Path):
                raise
            error = str(reason)
        errors = list(filter(None, _gather(error)))
        if not errors:
            return network
        self._note(f"no {scores}: {errors[0]}")
        if weights is not None and self.writes:  # asked for: a long test is not the time to wait with that
            print(f"Note: {self.results.notes[-1]}")
        return None

    def _find_training_maps(self, datamodule: Any) -> None:
        if datamodule.train is None:
            self._note("there is no nearest neighbour without training shards: give --data.train")
            return
        try:
            self.neighbours = Neighbours(datamodule.train, self.limit, self.device)
        except UserError as error:
            self._note(f"there is no nearest neighbour: {error}")

    def _note(self, text: str) -> None:
        self.results.notes.append(text)

    # One source after the other, on all ranks alike: closing one waits for the others.

    def _next(self) -> None:
        """Close the source that is open, and open the one that follows."""
        if self.open is not None:
            self._close(self.open)
            self.open = None
        if self.pending:
            self.open = self._opened(self.pending.pop(0))

    def _opened(self, source: str) -> Tally:
        tally = Tally(source)
        samples = self.samples[source]
        if len(samples) > 1:
            try:
                tally.floor = Floor(samples)
            except UserError as error:
                self._note(f"{source}: there is no floor: {error}")
        arms = [*self.drawn, CEILING, ORIGINAL]
        arms += [FLOOR] if tally.floor is not None else []
        arms += [NEIGHBOUR] if self.neighbours is not None else []
        tally.metrics = self._metrics(arms)
        return tally

    def _metrics(self, arms: Iterable[str]) -> dict[tuple[int, str], list[Metric]]:
        """New metrics by number of the eye and by arm."""
        made = {(number, arm): eye.metrics() for number, eye in enumerate(self.eyes) for arm in arms}
        for (_, arm), metrics in made.items():
            if arm == FLOOR:
                # Another image of a set is an image of that set: as a distance between sets, it says nothing.
                metrics[:] = [metric for metric in metrics if isinstance(metric, SampleMetric)]
            if arm == ORIGINAL:  # which agrees with itself, but not always with its label
                metrics[:] = [metric for metric in metrics if isinstance(metric, LabelAccuracy)]
        if self.diverse and (0, INVERSION) in made:
            made[0, INVERSION] += [PixelDiversity(self.replicates), MapDiversity(self.replicates)]
        return {key: [metric.to(self.device) for metric in metrics] for key, metrics in made.items() if metrics}

    def _finite(self, tally: Tally, arms: dict[str, Views], batch: Batch) -> tuple[dict[str, Views], Batch]:
        """Leave out samples with a value that is not finite, from all arms, and remember their keys."""
        tensors = [item[key] for item in (batch, *arms.values()) for key in ("features", "logits")]
        good = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in tensors]).all(0)
        if good.all():
            return arms, batch
        rows = good.nonzero().flatten().tolist()
        tally.left_out += [key for row, key in enumerate(batch["key"]) if row not in rows]
        return {arm: cast(Views, _rows(views, rows)) for arm, views in arms.items()}, cast(Batch, _rows(batch, rows))

    def _close(self, tally: Tally) -> None:
        """Compute the scores of a source, write its samples, and add it to its groups."""
        ranks = _gather((tally.columns, tally.left_out))
        names = dict.fromkeys(name for columns, _ in ranks for name in columns)
        columns = {name: [value for part, _ in ranks for value in part.get(name, [])] for name in names}
        left_out = sorted(key for _, keys in ranks for key in keys)
        if left_out:
            self._note(f"{tally.source}: left out {len(left_out)} samples, not finite, such as '{left_out[0]}'")
        foreign = sum(label >= self.num_classes for label in columns.get("label", []))
        if foreign:
            self._note(
                f"{tally.source}: {foreign} labels are none of the classifier's {self.num_classes} classes, and do not "
                "count. Are they those of another data set?"
            )
        tally.count = len(columns.get("key", []))
        self._score(tally)
        if tally.count and self.writes:
            write_bytes(samples_path(self.root, tally.source), samples_file(columns))
        for level in _groups(tally.source):
            if level not in self.groups:
                self.groups[level] = Tally(level, self._metrics(dict.fromkeys((*self.drawn, *ARMS))))
            self.groups[level].add(tally)
            if not any(source.startswith(f"{level}/") for source in self.pending):
                self._score(self.groups.pop(level))

    def _score(self, tally: Tally) -> None:
        if not tally.count:
            self._note(f"{tally.source}: no sample could be scored")
            return
        self.results.counts[tally.source] = tally.count
        for (number, arm), metrics in tally.metrics.items():
            for metric in metrics:
                with warnings.catch_warnings():  # a rank without samples has updated nothing, and a group only merges
                    warnings.filterwarnings("ignore", "The ``compute`` method")
                    values = metric.compute()
                if isinstance(metric, FrechetDistance) and arm == INVERSION and tally.count <= metric.num_features:
                    self.biased.setdefault(metric.name, []).append(tally.source)
                for name, value in values.items():
                    if value.isnan().all() and arm == INVERSION and not isinstance(metric, SampleMetric):
                        self._note(f"{tally.source}: {tally.count} samples are too few for {name}, which needs 2")
                    key = Name(tally.source, f"{self.eyes[number].prefix}{name}", arm)
                    self.results.values[key] = value.reshape(-1).cpu().numpy()


def _inception_distances() -> list[Metric]:
    return [FrechetDistance(INCEPTION_FEATURES, "fid"), KernelDistance(INCEPTION_FEATURES, "kid")]


def _groups(source: str) -> list[str]:
    """The groups that a source belongs to: `a/b` and `a` for `a/b/c`."""
    parts = source.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _rows(item: Any, rows: list[int]) -> dict[str, Any]:
    """Some rows of a batch or of views."""
    return {
        name: [value[row] for row in rows] if isinstance(value, list) else value[rows]
        for name, value in item.items()
        if isinstance(value, list | Tensor)
    }


def _gather(item: Any) -> list[Any]:
    """What each rank has."""
    if not torch.distributed.is_initialized():
        return [item]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, item)
    return gathered


def network_name(backbone: Any) -> str:
    """What timm calls the architecture, and the weights if they are its own, as part of a score's name."""
    config = backbone.model.pretrained_cfg
    parts = [config["architecture"], "" if Path(backbone.name).is_dir() else config.get("tag")]
    return re.sub(r"[^\w-]", "-", "-".join(part for part in parts if part))
