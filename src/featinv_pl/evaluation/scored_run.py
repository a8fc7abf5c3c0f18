"""What a tested run says of its classifier's errors, and the reconstructions that were stored of them."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from featinv_pl.bars import style
from featinv_pl.data.shards.datamodule import FeatureShards
from featinv_pl.data.shards.reader import DamagedError, ShardSet
from featinv_pl.data.shards.samples import Sample
from featinv_pl.errors import UserError
from featinv_pl.evaluation.reconstructions import ImageCache, Reconstructions
from featinv_pl.evaluation.results import (
    INVERSION,
    LABELS,
    METRICS,
    ORIGINAL,
    Document,
    column,
    read_document,
    read_samples,
)
from featinv_pl.files import read_yaml
from featinv_pl.inverter.identity import check_shards, sampling
from featinv_pl.inverter.runs import Run
from featinv_pl.metrics.estimates import Estimate, ImageSums, estimates
from featinv_pl.nets.backbone import Backbone
from featinv_pl.sampling.sampler import Sampler
from featinv_pl.types import Observation

MISCLASSIFIED, CORRUPTED, ADVERSARIAL = KINDS = ("misclassified", "corrupted", "adversarial")
METHODS = [method for method in LABELS if method != ORIGINAL]
CONTROL, JUDGED, JUDGED_CONTROL, JUDGED_ORIGINAL = "control", "held-out", "held-out control", "held-out original"
REPLICATES, MOST, AT_ONCE = 1000, 256, 64  # candidates of a kind for its gallery, and maps at a time
PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TENSORS = ("images", "features", "logits")
SETTINGS, ADVICE = "test.yaml", "Test again with the Evaluation callback."
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Kind:
    """The images of all test sets with one kind of error.

    Attributes:
        strengths: By test set, its severity, or the attack's epsilon in grey levels, or None.
        images: `key`, `label`, `seen` (the class that is predicted) and `set` of each.
        values: Shares by name, 0 and 1 or NaN where an image does not count: whether the wrong class is kept by a
            method, by its name; whether a right one is, with ` right` behind it; and the controls.
    """

    strengths: dict[str, float | None]
    images: Columns
    values: Columns

    @property
    def wrong(self) -> NDArray[Any]:
        return np.isfinite(self.values[INVERSION])

    def of_sets(self, names: Sequence[str]) -> NDArray[Any]:
        return self.wrong & np.isin(self.images["set"], names)

    def estimates(self, chosen: NDArray[Any] | None = None) -> dict[str, Estimate]:
        """The shares among chosen images, resampled by image, and so paired; those that no image has are left out."""
        columns = np.stack([*self.values.values()], axis=1)
        rows = np.isfinite(columns).any(1) & (True if chosen is None else chosen)
        sums = ImageSums(len(self.values))
        sums.add(self.images["key"][rows].tolist(), columns[rows])
        shares = [bool(np.isin(one[np.isfinite(one)], (0, 1)).all()) for one in columns[rows].T]
        found = estimates(list(sums.rows), sums.sums, sums.counts, shares, REPLICATES)
        return {name: one for name, one in zip(self.values, found, strict=True) if np.isfinite(one.values[0])}


class Case(NamedTuple):
    """An error: the sample, what was drawn from its map, and the probability that the drawing shows the wrong class."""

    sample: Sample
    drawing: Observation  # of one image, without the batch dimension
    share: float
    clean: tuple[Sample, Observation] | None  # the clean image, and what was drawn from its map from the same noise


@dataclass(frozen=True)
class ScoredRun:
    """A run that `test` has scored, with its shards and networks."""

    folder: Path
    document: Document
    data: FeatureShards
    clean: str
    judge: Backbone | None
    reconstructions: Reconstructions
    dtype: torch.dtype

    @classmethod
    def open(cls, folder: Path, device: str | torch.device) -> Self:
        """Read a run, and refuse one that is not tested, or has changed since."""
        if not (folder / METRICS).is_file():
            raise UserError(
                f"RUN: '{folder}' has not been tested: there is no {METRICS}. Run `featinv-pl test --config "
                f"{folder}/fit.yaml --ckpt_path CKPT` first."
            )
        document = read_document(folder / METRICS, "RUN")
        made_by, weights = document["provenance"], document["provenance"]["checkpoint"]
        if made_by["command"] != "test":
            raise UserError(
                f"RUN: the scores in '{folder}' are those of `{made_by['command']}`. Run `featinv-pl test`."
            )
        path = Path(weights["path"] or "")
        found = Run.find(path if path.is_file() else folder, "RUN")
        run = Run(found.checkpoint, folder, read_yaml(folder / SETTINGS, "RUN", ADVICE))
        inverter = run.inverter("RUN").to(device).eval()
        with run.as_saved("RUN"):
            options = run.settings["data"]["init_args"]
            data = FeatureShards(**{name: options[name] for name in ("test", "on_error", "cache")})
            callbacks = run.settings["trainer"]["callbacks"]
            [evaluation] = [one["init_args"] for one in callbacks if one["class_path"].endswith(".Evaluation")]
            inverter.sampler = Sampler.from_fields(made_by["sampling"]["samplers"][INVERSION])
            precision, seed = made_by["sampling"]["precision"], made_by["sampling"]["seed"]
            judge, clean = evaluation["judge"], evaluation["clean"]
        torch.manual_seed(seed)
        how = sampling(inverter, precision)
        if how["control"] != weights["digest"]:
            raise UserError(
                f"RUN: '{run.checkpoint}' has changed since '{folder}' was tested (weights {how['control'][:8]}, "
                f"scores of {weights['digest'][:8]}). {ADVICE}"
            )
        inverter.previews = made_by["sampling"]["previews"]
        cache = ImageCache(folder, {**inverter.identity(), **how})
        held_out = Backbone(judge).to(device) if judge else None
        if held_out is not None and held_out.num_classes != inverter.classifier.num_classes:
            held_out = None  # its classes are others
        check_shards({str(one.folder): one.manifest for one in data.test.values()}, inverter)
        reconstructions = Reconstructions(inverter, {}, cache=cache)
        return cls(folder, document, data, clean, held_out, reconstructions, PRECISIONS.get(precision, torch.float32))

    @cached_property
    def sets(self) -> dict[str, ShardSet]:
        """The test sets that have scores of their images and shards, by name."""
        return {name: shards for name, shards in self.data.test.items() if name in self.document["samples"]}

    @property
    def notes(self) -> list[str]:
        missing = [str(error) for error in (*self.data.absent.values(), *self.data.refused)]
        return missing + [f"{name}: not scored" for name in self.data.test.keys() - self.sets.keys()]

    def kinds(self) -> dict[str, Kind]:
        """The images of the run by kind of error, as far as there are any."""
        clean = _columns(self.folder, self.clean) if self.clean in self.sets else None
        parts: dict[str, list[tuple[str, float | None, Columns]]] = {}
        for name, shards in self.sets.items():
            epsilon = re.search(r"epsilon=([\d.]+)", attack := shards.manifest["provenance"]["attack"])
            severity = re.fullmatch(r".+/[^/]+/(\d+)", name)
            kind = ADVERSARIAL if attack else CORRUPTED if severity else MISCLASSIFIED
            if kind != MISCLASSIFIED and clean is None:
                continue
            match = epsilon or severity
            found = self._values(_columns(self.folder, name), None if kind == MISCLASSIFIED else clean)
            found["set"] = np.full(len(found["key"]), name)
            parts.setdefault(kind, []).append((name, float(match[1]) if match else None, found))
        kinds = {}
        for kind in KINDS:
            if several := parts.get(kind):
                names = dict.fromkeys(name for *_, found in several for name in found)
                joined = {
                    name: np.concatenate([found.get(name, np.full(len(found["key"]), np.nan)) for *_, found in several])
                    for name in names
                }
                images = {name: joined.pop(name) for name in ("key", "label", "seen", "set")}
                kinds[kind] = Kind({name: strength for name, strength, _ in several}, images, joined)
        return {name: kind for name, kind in kinds.items() if kind.wrong.any()}

    def _values(self, columns: Columns, clean: Columns | None) -> Columns:
        """Images and values of one test set; see `Kind`. With `clean`, only those count whose clean image is right."""
        keys, labels, seen = columns["key"], columns["label"], columns[column("predicted", ORIGINAL)]
        known = (labels >= 0) & (labels < self.reconstructions.inverter.classifier.num_classes)
        twins = np.zeros(len(keys), int)
        if clean is not None:
            rows = {key: row for row, key in enumerate(clean["key"])}
            twins = np.array([rows.get(key, -1) for key in keys])
            known &= (twins >= 0) & (clean["label"][twins] == labels)
            known &= clean[column("predicted", ORIGINAL)][twins] == labels
        right, wrong = known & (seen == labels), known & (seen != labels)
        found = {"key": keys, "label": labels, "seen": seen}
        for method in METHODS:
            if (name := column("predicted", method)) in columns:
                found[method] = np.where(wrong, columns[name] == seen, np.nan)
                found[f"{method} right"] = np.where(right, columns[name] == seen, np.nan)
        if self.judge and "judge_predicted" in columns:
            found[JUDGED] = np.where(wrong, columns["judge_predicted"] == seen, np.nan)
            if (name := column("judge_predicted", ORIGINAL)) in columns:
                found[JUDGED_ORIGINAL] = np.where(wrong, columns[name] == seen, np.nan)
        for name, drawn in ((CONTROL, "predicted"), (JUDGED_CONTROL, "judge_predicted" if JUDGED in found else "")):
            if drawn and clean is not None:
                found[name] = np.where(wrong, clean[drawn][twins] == seen, np.nan)
            elif drawn:
                found[name] = np.full(len(keys), np.nan)
                for pair in np.unique(np.stack([labels, seen], 1)[wrong], axis=0):
                    alike, these = right & (labels == pair[0]), wrong & (labels == pair[0]) & (seen == pair[1])
                    found[name][these] = (columns[drawn][alike] == pair[1]).mean() if alike.any() else np.nan
        return found

    @torch.no_grad()
    def cases(self, name: str, kind: Kind, count: int) -> list[Case]:
        """Errors from that whose drawing shows the wrong class most plainly to that which does least, evenly spaced.

        At most 256 are compared, the first of each set: sets are stored in random order.
        """
        most = -(-MOST // len(kind.strengths))
        keys = {one: {*kind.images["key"][kind.of_sets([one])].tolist()} for one in kind.strengths}
        places = [(self.sets[one], number) for one in keys for number in _places(self.sets[one], keys[one], most)]
        classes = dict(zip(zip(kind.images["set"], kind.images["key"], strict=True), kind.images["seen"], strict=True))
        ranked: list[tuple[float, int]] = []
        for start in tqdm(range(0, len(places), AT_ONCE), **style(f"{name} images", "batch")):
            part = [_maps(shards).stored(number) for shards, number in places[start : start + AT_ONCE]]
            drawn = self._drawn(part)
            logits = drawn["logits"] if self.judge is None else self.judge.classify(drawn["images"])["logits"]
            for row, (sample, share) in enumerate(zip(part, logits.float().softmax(1), strict=True)):
                ranked.append((share[int(classes[sample["source"], sample["key"]])].item(), start + row))
        ranked.sort(reverse=True)
        chosen = [ranked[row] for row in np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)]
        samples = [places[place][0][places[place][1]] for _, place in chosen]
        clean, twins = self.sets.get(self.clean), dict[str, tuple[Sample, Observation]]()
        if name != MISCLASSIFIED and clean is not None:
            found = [clean[number] for number in _places(clean, {one["key"] for one in samples}, len(clean))]
            twins = {one["key"]: (one, drawn) for one, drawn in zip(found, self._each(found), strict=True)}
        return [
            Case(sample, drawn, share, twins.get(sample["key"]))
            for sample, drawn, (share, _) in zip(samples, self._each(samples), chosen, strict=True)
        ]

    def _each(self, samples: Sequence[Sample]) -> list[Observation]:
        drawn: Any = self._drawn(samples)
        return [cast(Any, {name: drawn[name][row] for name in TENSORS}) for row in range(len(samples))]

    def _drawn(self, samples: Sequence[Sample]) -> Observation:
        """What was drawn from maps, as `test` has stored it; what is not stored is drawn again, from the same noise."""
        inverter = self.reconstructions.inverter
        batch: Any = {
            "features": torch.stack([sample["features"] for sample in samples]).float().to(inverter.device),
            "key": [sample["key"] for sample in samples],
        }
        with torch.autocast(inverter.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.reconstructions.sample(batch, inverter.sampler)


def _maps(shards: ShardSet) -> ShardSet:
    """A shard set without images, which take most of the time."""
    shards = copy.copy(shards)
    shards.with_images = False
    return shards


def _places(shards: ShardSet, keys: set[str], most: int) -> list[int]:
    """The numbers of the first samples with one of the keys."""
    found: list[int] = []
    left = set(keys)
    for number in range(len(shards)):
        if not left or len(found) == most:
            break
        try:
            key = _maps(shards).stored(number)["key"]
        except DamagedError:
            continue
        if key in left:
            found.append(number)
            left.discard(key)
    return found


def _columns(folder: Path, test_set: str) -> Columns:
    table = read_samples(folder, test_set, [test_set])
    if column("predicted", ORIGINAL) not in table.column_names:
        raise UserError(f"RUN: the classifier of '{folder}' predicts no classes, so it makes no errors.")
    return {name: table[name].to_numpy() for name in table.column_names if re.match("key|label$|.*predicted", name)}
