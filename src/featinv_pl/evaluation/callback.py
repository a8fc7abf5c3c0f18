"""The evaluation of an inverter, in validation and in testing."""

import io
import logging
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor

from featinv_pl.errors import UserError, renamed
from featinv_pl.evaluation.baselines import from_training_shards
from featinv_pl.evaluation.pictures import CURVES, Pictures, cosine_plots, log_picture, log_table, severity_plots
from featinv_pl.evaluation.reconstructions import ImageCache, Reconstructions
from featinv_pl.evaluation.results import HEADLINES, INVERSION, LABELS, METRICS, Provenance, Results, aligned, label
from featinv_pl.evaluation.scorers import Scorer, classifier_scorer, judge_scorer, published_scorers
from featinv_pl.evaluation.scores import Scores
from featinv_pl.files import write_bytes
from featinv_pl.inverter.identity import sampling
from featinv_pl.metrics.weights import Weights
from featinv_pl.nets.backbone import Backbone
from featinv_pl.pages.plots import sheet
from featinv_pl.runtime.internals import hide_score_tables
from featinv_pl.runtime.ranks import hands_back_little
from featinv_pl.runtime.saving import provenance
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.types import Batch

REPLICATES = 1000
BATCHES = 3  # of a dry run
LIBRARIES = ("torch", "lightning", "diffusers", "timm")  # whose versions are kept
log = logging.getLogger("featinv_pl")


class Evaluation(Callback):
    """Reconstructs every batch of `validate` and `test`, and scores and shows the reconstructions.

    Each score, `<test set>/<score>`, stands beside those of the baselines on the same images: `.floor` is another image
    of the test set, `.ceiling` the original through the autoencoder alone, `.regression` and `.neighbour` (in `test`)
    what a small network predicts and the training image with the most similar map, `label@1.original` the accuracy of
    the classifier. docs/scores.md explains them, and the files in `<default_root_dir>`. What cannot be scored is left
    out and named in a note. `test` stores reconstructions, from which the same command resumes after an interruption.

    Args:
        clean: The test set that corrupted ones are compared with.
        judge: A held-out classifier, which neither training nor refinement has seen: it scores originals and
            reconstructions too. Named as `backbone` is.
        num_samples: Reconstructions of each feature map in `test`. The first is scored; if there are more, so are
            their differences.
        samplers: Further samplers by name, whose reconstructions `test` scores as `<score>.<name>`, such as one with
            refinement, or one without the control.
        baselines: Those that are made from the training shards when a test starts; `ridge` is a linear regression.
        num_images: Images of each test set in its pictures, at most 128; 0 for no pictures.
        inception: The Inception weights of 2015, which define `fid` and `kid`: a file, or `download` to fetch it
            once. By default they are used if torch has downloaded them before.
        alexnet: The AlexNet weights that define `lpips`, likewise.
        dry_run: Let `test` time a few batches, print an estimate of the hours, and write nothing.
    """

    def __init__(
        self,
        clean: str = "clean",
        judge: str | None = None,
        num_samples: int = 1,
        samplers: dict[str, Sampler] | None = None,
        baselines: tuple[Literal["regression", "ridge", "neighbour"], ...] = ("regression", "neighbour"),
        num_images: int = 12,
        inception: Weights = None,
        alexnet: Weights = None,
        dry_run: bool = False,
    ) -> None:
        if num_samples < 1:
            raise UserError(f"`num_samples` must be at least 1, and is {num_samples}.")
        taken = {*LABELS, *LABELS.values(), "own"}  # the study's word for the inverter's sampler
        for name in samplers or {}:
            if name in taken or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                why = "is the name of another method" if name in taken else "cannot be part of a score's name"
                raise UserError(f"`samplers`: '{name}' {why}. Use other letters, digits, - and _.")
        self.clean, self.num_samples, self.samplers, self.baselines = clean, num_samples, samplers or {}, baselines
        self.num_images, self.inception, self.alexnet, self.dry_run = num_images, inception, alexnet, dry_run
        # A control is initialised alike with and without a judge.
        with torch.random.fork_rng(devices=[]), renamed("backbone", "judge"):
            self.judge = Backbone(judge) if judge else None
        self.sizes: dict[str, int] | None = None
        self.timed: list[tuple[float, int]] = []
        self.ceilings: dict[str, Tensor] = {}  # of one fit

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.ceilings.clear()
        if self.dry_run and stage == "test":
            self.sizes = trainer.datamodule.test_first_set_only()

    def _start(self, trainer: Any, pl_module: Any) -> None:
        data, inverter, stage = trainer.datamodule, pl_module.inverter, "test" if trainer.testing else "validate"
        samplers, num_samples = (self.samplers, self.num_samples) if trainer.testing else ({}, 1)
        if self.sizes is not None:
            self.reconstructions = Reconstructions(inverter, samplers, num_samples)
            return
        hide_score_tables(trainer)  # a line for each of hundreds of scores; the summary replaces it
        self.results, self.stage = Results(), stage
        note, test_sets = self.results.notes.append, data.evaluated(stage)
        self.step = max(trainer.global_step - 1, 0)  # under which Lightning logs scalars at this moment
        self.training = trainer.state.fn == "fit"
        self.replicates = 0 if self.training else REPLICATES  # in the middle of training an interval costs too much
        self.writes = trainer.is_global_zero and not self.training
        # `validate` has a folder of its own, so that it leaves what `test` wrote.
        self.root = Path(trainer.default_root_dir) / ("validate" if trainer.state.fn == "validate" else "")
        how = {} if self.training else sampling(inverter, str(trainer.precision))
        baselines, cache = {}, None
        if trainer.testing:
            for name, reason in data.left_out.items():
                note(f"{name}: left out, for {reason}")
            baselines = from_training_shards(trainer, inverter, data, self.baselines, note)
            cache = ImageCache(self.root, {**inverter.identity(), **how})
        if self.writes:
            self.results.provenance = _provenance(trainer, pl_module, samplers, how)
        ceilings = self.ceilings if self.training else None
        self.reconstructions = Reconstructions(inverter, samplers, num_samples, baselines, cache, ceilings)
        scorers = self._scorers(inverter, num_samples > 1)
        lossy = [name for name, one in test_sets.items() if one.manifest["settings"]["image_format"] == "jpg"]
        if lossy:
            sets = lossy[0] + f" and {len(lossy) - 1} others" * (len(lossy) > 1)
            affected = "scores of images (psnr, ssim, lpips, fid, kid)"
            note(f"{sets}: the originals are stored as JPEGs and reconstructions are not, which affects {affected}")
        methods, samples = self.reconstructions.methods, self.root if self.writes else None
        self.scores = Scores(self.results, test_sets, scorers, methods, inverter, self.clean, samples)
        weights = how.get("control")
        labels = [one.manifest["settings"].get("classes", {}) for one in test_sets.values()]
        classes = {index: name for known in labels for name, index in known.items()}
        written = self.root, weights, trainer.loggers, self.step
        self.pictures = Pictures(self.num_images, list(samplers), *written, classes)

    def _scorers(self, inverter: Any, diverse: bool) -> list[Scorer]:
        classifier, count, note = inverter.classifier, self.replicates, self.results.notes.append
        if not classifier.classifies:
            note(f"there are no scores of classes: '{classifier.title}' has no classes, so its maps are scored")
        found = [classifier_scorer(classifier, count, diverse)]
        if self.training:
            return found
        if self.judge is not None:
            found.append(judge_scorer(self.judge.to(inverter.device), count))
        return found + published_scorers(self.inception, self.alexnet, count, inverter.device, note)

    def _update(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        with trainer.precision_plugin.forward_context():
            if self.sizes is not None:
                start = time.perf_counter()
                self.reconstructions(batch)[INVERSION]["logits"].cpu()  # waits for the result
                self.timed.append((time.perf_counter() - start, len(batch["key"])))
                return
            tally = self.scores.open(batch["source"][0])
            made = self.reconstructions(batch, tally.floor)
        tally.update(batch, made)
        if self.num_images:
            self.pictures.update(batch, made)

    def _finish(self, trainer: Any, pl_module: Any) -> None:
        """Close all test sets, and give the scores to loggers, to callbacks that monitor one, and to the caller."""
        if self.sizes is not None:
            return
        self.scores.finish(self.replicates)
        self.pictures.finish()
        found = self.results.scores
        logged = {str(name): score["value"] for name, score in found.items()}
        if hands_back_little(trainer):
            for logger in trainer.loggers:
                logger.log_metrics(logged, self.step)
            own = (name for name in found if name.method == INVERSION and "/" not in name.test_set)
            logged = {str(name): found[name]["value"] for name in own if self.training or name.score in HEADLINES}
        pl_module.log_dict(logged, sync_dist=True)  # the same on all ranks, but without this Lightning warns of each

    def _end(self, trainer: Any, pl_module: Any) -> None:
        if self.sizes is not None:
            if trainer.is_global_zero:
                print(f"\n{self._hours(self.sizes, trainer.world_size)}")
        elif self.writes:
            if "val/loss" in trainer.callback_metrics:
                print(f"val/loss {trainer.callback_metrics['val/loss']:.4f}")
            for name, data in self.results.files().items():
                write_bytes(self.root / name, data)
            columns = get_terminal_size().columns if sys.stdout.isatty() else None
            print("\n" + aligned(self.results.table(), columns))
            for note in self.results.notes:
                log.warning("Note: %s", note)
            self._plot(trainer)
            print(f"{len(self.results.scores)} scores in {self.root / METRICS}")

    on_validation_start = on_test_start = _start
    on_validation_batch_end = on_test_batch_end = _update
    on_validation_epoch_end = on_test_epoch_end = _finish
    on_validation_end = on_test_end = _end

    def _plot(self, trainer: Any) -> None:
        title, complete = label(INVERSION), [name for name in self.results.counts if "/" not in name]
        scored = {title: self.results.document}
        curves = {
            f"{corruption}, {score}": plot
            for score in CURVES
            for corruption, plot in severity_plots(scored, score, self.clean).items()
        }
        histograms = cosine_plots({title: self.root}, complete, self.results.counts)
        for name, found, caption in (
            ("severity", curves, "scores against the severity of corruptions, with 95 % intervals"),
            ("histograms", histograms, "distribution of the cosine over the images of each test set"),
        ):
            if found:
                png = sheet(found)
                write_bytes(self.root / "plots" / f"{name}.png", png)
                pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
                log_picture(trainer.loggers, f"plots/{name}", pixels, caption, self.step)
        log_table(trainer.loggers, f"scores/{self.stage}", self.results.table(), "with 95 % intervals", self.step)

    def _hours(self, sizes: Mapping[str, int], processes: int) -> str:
        timed = self.timed[1:] or self.timed  # the first batch warms up
        seconds = sum(time for time, _ in timed) / sum(samples for _, samples in timed) / processes
        sizes = {**sizes, "all": sum(sizes.values())}
        rows = [[name, str(size), f"{size * seconds / 3600:.2g}"] for name, size in sizes.items()]
        text = f"From {len(timed)} batches at {seconds:.3g} s a sample, on {processes} process{'es' * (processes > 1)}."
        return "\n".join([aligned([["test set", "samples", "hours"], *rows]), text])


def _provenance(trainer: Any, module: Any, samplers: Mapping[str, Sampler], how: Mapping[str, Any]) -> Provenance:
    used = {name: asdict(sampler) for name, sampler in {INVERSION: module.inverter.sampler, **samplers}.items()}
    path, step = trainer.ckpt_path, trainer.global_step or module.loaded_step
    described = {
        "command": trainer.state.fn.value,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {"path": None if path is None else str(path), "step": step, "digest": how["control"]},
        "model": module.inverter.identity(),
        "networks": {"classifier": module.inverter.classifier.title, "prior": str(module.inverter.prior.source)},
        "libraries": {name: version(name) for name in LIBRARIES},
        "sampling": {name: value for name, value in how.items() if name != "control"} | {"samplers": used},
    }
    return cast(Provenance, described | provenance(trainer))
