"""Scores for each source, with floor, ceiling and baselines beside every figure."""

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, cast

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torchmetrics import Metric

from featinv_pl.errors import UserError
from featinv_pl.evaluation.arms import ARMS, CEILING, FLOOR, INVERSION, NEIGHBOUR, ORIGINAL, REGRESSION, label
from featinv_pl.evaluation.loggers import last_step, log_picture, log_table
from featinv_pl.evaluation.neighbours import Neighbours
from featinv_pl.evaluation.plots import cosine_histograms, severity_curves
from featinv_pl.evaluation.references import Floor
from featinv_pl.evaluation.regression import Regression
from featinv_pl.evaluation.relative import Relative
from featinv_pl.evaluation.results import HEADLINES, METRICS, Results, aligned, samples_file, samples_path
from featinv_pl.evaluation.scorers import Classes, Scorer, scorers
from featinv_pl.evaluation.sets import EvaluationCallback, results_root
from featinv_pl.evaluation.tally import Tally
from featinv_pl.files import write_bytes
from featinv_pl.metrics.frechet import FrechetDistance
from featinv_pl.metrics.sample_metric import SampleMetric
from featinv_pl.metrics.weights import Weights
from featinv_pl.runtime.provenance import evaluation
from featinv_pl.runtime.ranks import agree, hands_back_little
from featinv_pl.types import Batch, Observation, Reconstruction

REPLICATES = 1000
CAPTIONS = {
    "scores": "with 95 % intervals",
    "severity": "scores against the severity of corruptions, with 95 % intervals",
    "histograms": "how the cosine is distributed over the samples of each source",
}


class PerSource(EvaluationCallback):
    """Scores every source, logs `<source>/<score>`, and writes the scores of `validate` and `test`.

    Beside each score of the inversion stand those of other arms, by the same metrics on the same images:

    * `<score>.floor`: another image of the source, chosen by key (not for distances between sets).
    * `<score>.ceiling`: the original through the prior's autoencoder alone.
    * `label@1.original`: the original itself, that is, the accuracy of the backbone.
    * `<score>.regression`: in `test`, the image of the latents that a small network, fitted to the training shards,
      expects of the map.
    * `<score>.neighbour`: in `test`, the training image with the most similar map.
    * `<score>.<name>`: in `test`, what the sampler of that name has drawn (`--model.arms`).

    A source `a/b/c` also counts for `a/b` and `a`. `<default_root_dir>` gets `metrics.json` and
    `scores.csv` with all scores and their 95 % intervals, and `samples/<source>.parquet` with every
    sample; `plots/` shows them. What cannot be scored is left out and named; the rest is scored all the same.

    Args:
        clean: The source that corrupted ones are compared with.
        baselines: Those that are made from the training shards when a test starts.
        inception: The Inception weights of 2015, by which `fid` and `kid` are defined: a file, or
            `download` to fetch it once. By default it is used if torch has downloaded it before.
        alexnet: The AlexNet weights by which `lpips` is defined, likewise.
    """

    def __init__(
        self,
        clean: str = "clean",
        baselines: tuple[Literal["regression", "neighbour"], ...] = ("regression", "neighbour"),
        inception: Weights = None,
        alexnet: Weights = None,
    ) -> None:
        self.clean, self.wanted = clean, baselines
        self.weights = {"inception": inception, "alexnet": alexnet}
        self.results = Results()
        self.pending: list[str] = []
        self.open: Tally | None = None
        self.groups: dict[str, Tally] = {}
        self.relative = Relative(clean)
        self.scorers: list[Scorer] = []
        self.baselines: dict[str, Callable[[Batch], Observation]] = {}

    def start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make everything new."""
        datamodule = cast(Any, trainer).datamodule
        self.results = Results()
        self.drawn = [INVERSION, *(cast(Any, pl_module).arms if stage == "test" else [])]
        self.pending = list(datamodule.sources(stage))
        self.open, self.groups, self.relative = None, {}, Relative(self.clean)
        self.device = pl_module.device
        self.num_classes = cast(Any, pl_module).inverter.classifier.num_classes
        self.biased: dict[str, list[str]] = {}
        self.root = results_root(trainer)
        # Which would print a line for each score; a table of those that matter most stands for it.
        trainer.validate_loop.verbose = trainer.test_loop.verbose = False
        self.loggers, self.stage, self.step = trainer.loggers, stage, last_step(trainer)
        self.writes = trainer.state.fn != "fit" and trainer.is_global_zero
        self.results.provenance = evaluation(trainer, pl_module) if self.writes else None
        self.samples = datamodule.test if stage == "test" else {"val": datamodule.val}
        # In the middle of training an interval is not worth its time, and nothing is written.
        self.replicates = 0 if trainer.state.fn == "fit" else REPLICATES
        diverse = stage == "test" and cast(Any, pl_module).num_samples > 1
        self.scorers, notes = scorers(pl_module, self.replicates, diverse, **self.weights)
        self.results.notes += notes
        for source in self.skipped if stage == "test" else []:
            self._note(f"{source}: left out, for it has fewer samples than there are processes")
        lossy = [name for name in self.pending if self.samples[name].manifest["settings"]["image_format"] == "jpg"]
        if lossy and self.writes:
            others = f" and {len(lossy) - 1} others" * (len(lossy) > 1)
            self._note(
                f"{lossy[0]}{others}: the originals are stored as JPEGs, and reconstructions are not, which shows in "
                "scores of images (psnr, ssim, lpips, fid, kid)"
            )
        self.baselines = self._baselines(trainer, pl_module) if stage == "test" else {}

    def update(self, batch: Batch, outputs: Reconstruction) -> None:
        """Add a batch, all of one source."""
        while self.open is None or self.open.source != batch["source"][0]:
            self._next()
        arms = {INVERSION: cast(Observation, outputs), CEILING: outputs["ceiling"], ORIGINAL: cast(Observation, batch)}
        arms |= outputs.get("arms", {})
        arms |= {arm: baseline(batch) for arm, baseline in self.baselines.items()}
        if self.open.floor is not None:
            arms[FLOOR] = self.open.floor(batch)
        self.open.update(batch, arms)

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the last sources and log all scores."""
        while self.pending or self.open is not None:
            self._next()
        for name, sources in self.biased.items():
            self._note(
                f"{name} is biased upwards where there are no more samples than features, such as in {sources[0]}"
                + f" and {len(sources) - 1} others" * (len(sources) > 1)
            )
        self.results.derive()
        estimates, notes = self.relative.estimates(self.replicates)
        self.results.values |= estimates
        self.results.notes += notes
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        """Hand the scores to the loggers, to callbacks that monitor one, and to who called `validate` or `test`."""
        found, training = self.results.scores, trainer.state.fn == "fit"
        scores = {str(name): score["value"] for name, score in found.items()}
        if hands_back_little(trainer):
            for logger in trainer.loggers:
                logger.log_metrics(scores, self.step)
            own = (name for name in found if name.arm == INVERSION and "/" not in name.source)
            scores = {str(name): found[name]["value"] for name in own if training or name.score in HEADLINES}
        module.log_dict(scores, sync_dist=True)  # the same on all ranks, but without this Lightning warns of each

    def end(self, trainer: Trainer) -> None:
        """Write the files, and show what matters most."""
        if self.writes:
            if "val/loss" in trainer.callback_metrics:
                print(f"val/loss {trainer.callback_metrics['val/loss']:.4f}")
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

    def _baselines(self, trainer: Trainer, module: LightningModule) -> dict[str, Callable[[Batch], Observation]]:
        """What is reconstructed without the inverter, by arm."""
        data = cast(Any, trainer).datamodule
        found: dict[str, Callable[[Batch], Observation]] = {}
        shards = {REGRESSION: data.train, NEIGHBOUR: data.train if data.neighbours is None else data.neighbours}
        makers: dict[str, Callable[[], Callable[[Batch], Observation]]] = {
            REGRESSION: lambda: Regression(trainer, module, shards[REGRESSION], data.num_workers),
            NEIGHBOUR: lambda: Neighbours(trainer, shards[NEIGHBOUR], data.num_workers, self.device),
        }
        for name in self.wanted:
            if not shards[name]:  # none, or without samples
                self._note(f"no {name}: there are no training samples. Give --data.train")
                continue
            try:
                found[name] = makers[name]()
            except UserError as error:
                self._note(f"no {name}: {error}")
        return found

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
        samples, floor = self.samples[source], None
        if len(samples) > 1:
            try:
                floor = agree(lambda: Floor(samples))
            except UserError as error:
                self._note(f"{source}: there is no floor: {error}")
        classes = self._classes(source, samples.manifest["settings"].get("classes", {}))
        arms = [*self.drawn, CEILING, ORIGINAL, *self.baselines, *([] if floor is None else [FLOOR])]
        return Tally(source, self.scorers, self._metrics(arms, classes), floor, classes)

    def _classes(self, source: str, labels: Mapping[str, int]) -> list[int] | None:
        """The classes of a source, if they are a part of the classifier's: of one class all would be right."""
        classes = sorted({label for label in labels.values() if 0 <= label < self.num_classes})
        if not 1 < len(classes) < self.num_classes:
            return None
        self._note(
            f"{source}: label@1 is taken over the {len(classes)} classes of the set, as is usual for ImageNet-A and "
            f"-R, and label@1_all over all {self.num_classes} of the classifier"
        )
        return classes

    def _metrics(self, arms: Iterable[str], classes: Classes = None) -> dict[tuple[int, str], list[Metric]]:
        """New metrics by number of the scorer and by arm."""
        made = {
            (number, arm): scorer.metrics(arm, classes) for arm in arms for number, scorer in enumerate(self.scorers)
        }
        return {key: [metric.to(self.device) for metric in metrics] for key, metrics in made.items() if metrics}

    def _close(self, tally: Tally) -> None:
        """Compute the scores of a source, write its samples, and add it to its groups."""
        tally.gather()
        if tally.left_out:
            example = tally.left_out[0]
            self._note(f"{tally.source}: left out {len(tally.left_out)} samples, not finite, such as '{example}'")
        foreign = sum(label >= self.num_classes for label in tally.columns.get("label", []))
        if foreign and self.scorers[0].classifies:
            self._note(
                f"{tally.source}: {foreign} labels are none of the classifier's {self.num_classes} classes, and do not "
                "count. Are they those of another data set?"
            )
        self._score(tally)
        if tally.count and self.writes:
            write_bytes(samples_path(self.root, tally.source), samples_file(tally.columns))
        self.relative.add(tally.source, _groups(tally.source), tally.columns)
        for level in _groups(tally.source):
            if level not in self.groups:
                metrics = self._metrics(dict.fromkeys((*self.drawn, *ARMS)))
                self.groups[level] = Tally(level, self.scorers, metrics, parts=0)
            self.groups[level].add(tally)
            if not any(source.startswith(f"{level}/") for source in self.pending):
                self._score(self.groups.pop(level))

    def _score(self, tally: Tally) -> None:
        if not tally.count:
            self._note(f"{tally.source}: no sample could be scored")
            return
        self.results.counts[tally.source] = tally.count
        for name, estimate, metric in tally.estimates():
            self.results.values[name] = estimate
            if name.arm != INVERSION or isinstance(metric, SampleMetric):
                continue
            if isinstance(metric, FrechetDistance) and tally.count <= metric.num_features:
                self.biased.setdefault(name.score, []).append(tally.source)
            if np.isnan(estimate.values[0]):
                self._note(f"{tally.source}: {tally.count} samples are too few for {name.score}, which needs 2")


def _groups(source: str) -> list[str]:
    """The groups that a source belongs to: `a/b` and `a` for `a/b/c`."""
    parts = source.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
