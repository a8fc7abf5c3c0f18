"""Whether steering and interpolation do what they claim, on digits, where truth is known.

    make viz-digits

For every ordered pair of classes a and b, the way from the mean map of a to that of b is added to test
images of a; the reconstruction should be classified as b. A random direction of the same norm should not do that;
the mean of the way over locations is tried too. The ends of an interpolation should be reconstructed as well as the
pictures' own maps are. `--short` is for a demo that was cut short, and takes two classes and one image of each.
"""

import sys
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from featinv_pl.explore.concepts import Concepts, difference_concepts, pairs_of_labels
from featinv_pl.explore.exploration import Samples, read_samples
from featinv_pl.explore.pairs import interpolate
from featinv_pl.explore.paths import Mode
from featinv_pl.explore.steering import Steering, steer
from featinv_pl.inverter.outputs import as_picture
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.pages.page import Report, Section, Tile, prediction
from featinv_pl.publishing import export
from featinv_pl.sampling.noise import generator

DEMO, OUT = Path("runs/demo"), Path("runs/viz/evidence")
SHORT = "--short" in sys.argv
IMAGES = 1 if SHORT else 4  # of each class
STRENGTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
CLASSES = (3, 6) if SHORT else range(10)
MODES: tuple[Mode, ...] = ("linear", "slerp")


@dataclass(frozen=True)
class Evidence(Report):
    """What was measured.

    Attributes:
        measured: By name.
        drawn: By pair of classes, the first image at the largest strength.
    """

    name: ClassVar[str] = "evidence"

    measured: dict[str, float]
    drawn: dict[tuple[int, int], Steering]

    @property
    def title(self) -> str:
        """See `Report`."""
        return "From every digit to every other"

    @property
    def lead(self) -> str:
        """See `Report`."""
        return "; ".join(f"{name}: {value:.3f}" for name, value in self.measured.items())

    def sections(self) -> list[Section]:
        """See `Report`."""
        text = "Row a, column b: a picture of a, moved from a's mean map to b's; on the diagonal the picture itself."
        return [Section("Moved from class a (row) to class b (column)", text, [self._row(a) for a in CLASSES])]

    def _row(self, a: int) -> list[Tile]:
        tiles = []
        for b in CLASSES:
            moved = self.drawn[a, next(c for c in CLASSES if c != a) if a == b else b]
            image, logits = moved.found["images"][-1, 0], moved.found["logits"][-1, 0]
            if a == b:
                [image], [logits] = moved.originals["images"], moved.originals["logits"]
            tiles.append(Tile(as_picture(image), prediction(logits), int(logits.argmax()) != b))
        return tiles

    def facts(self) -> dict[str, Any]:
        """See `Report`."""
        return self.measured


def randomised(concepts: Concepts) -> Concepts:
    """Directions of the same norms, and random otherwise."""
    noise = torch.randn(concepts.directions.shape, generator=generator("random directions"))
    norms = [tensor.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for tensor in (concepts.directions, noise)]
    return replace(concepts, directions=noise * norms[0] / norms[1])


def pictures_of(samples: Samples, pipeline: FeatInvPipeline) -> dict[int, list[Image.Image]]:
    """The first test images of each class that are classified as labelled, which nothing is after a short demo."""
    found: dict[int, list[Image.Image]] = {label: [] for label in CLASSES}
    for index, label in enumerate(samples.labels.tolist()):
        if label in found and len(found[label]) < IMAGES:
            picture = samples.picture(index)
            if SHORT or int(pipeline.classify(pipeline.crop([picture]))["logits"].argmax()) == label:
                found[label].append(picture)
    return found


def moved(
    pipeline: FeatInvPipeline, concepts: Concepts, pictures: dict[int, list[Image.Image]], strengths: list[float]
) -> dict[tuple[int, int], list[Steering]]:
    """Every picture moved to every other class."""
    return {
        (a, b): [steer(pipeline, one, concepts, number, strengths, controls=False) for one in pictures[a]]
        for number, (a, b) in enumerate(permutations(CLASSES, 2))
    }


def arrived(steerings: dict[tuple[int, int], list[Steering]]) -> tuple[float, float]:
    """The share of images that are classified as b at the largest strength, and of pairs for which most are."""
    hits = torch.tensor(
        [[int(one.found["logits"][-1, 0].argmax()) == b for one in several] for (_, b), several in steerings.items()]
    ).double()
    return hits.mean().item(), (hits.mean(1) > 0.5).double().mean().item()


def main() -> None:
    """Measure, print a table, and write `runs/viz/evidence/evidence.{html,png,json}`."""
    model = OUT.with_name("model")
    if not model.exists():
        export(DEMO / "spatial", model)
    pipeline = FeatInvPipeline.from_pretrained(model)
    train = read_samples([DEMO / "shards/train"], 10_000, "SHARDS")
    pictures = pictures_of(read_samples([DEMO / "shards/clean"], 10_000, "SHARDS"), pipeline)
    pairs = pairs_of_labels(train, list(permutations(CLASSES, 2)))
    concepts = difference_concepts(train, pairs, pooled=False)

    towards = moved(pipeline, concepts, pictures, STRENGTHS)
    arms = {
        "the direction": towards,
        "a random direction": moved(pipeline, randomised(concepts), pictures, STRENGTHS[-1:]),
        "the pooled direction": moved(
            pipeline, difference_concepts(train, pairs, pooled=True), pictures, STRENGTHS[-1:]
        ),
    }
    measured: dict[str, float] = {}
    for name, steerings in arms.items():
        images, of_pairs = arrived(steerings)
        measured |= {f"images that become b, {name}": images, f"pairs most of whose images do, {name}": of_pairs}
    ranks = [one.spearman or 0.0 for several in towards.values() for one in several]
    measured["Spearman of strength and score"] = sum(ranks) / len(ranks)

    originals = pipeline.classify(pipeline.crop([several[0] for several in pictures.values()]))["features"]
    plain = [pipeline.classify(pipeline.reconstruct(one))["features"][0] for one in originals]
    cosines = cosine_similarity(torch.stack(plain), originals).mean((1, 2))
    measured["cosine of plain reconstructions"] = cosines.mean().item()
    for mode in MODES:
        ends, flags = [], []
        for a, b in permutations(CLASSES, 2):
            found = interpolate(pipeline, pictures[a][0], pictures[b][0], 11, mode, train, controls=False)
            ends += [found.cosines[0, 0], found.cosines[-1, 1]]
            flags += found.flags["features"]
        measured[f"cosine of the ends, {mode}"] = torch.stack(ends).mean().item()
        measured[f"steps flagged, {mode}"] = sum(flags) / len(flags)
    Evidence(measured, {pair: several[0] for pair, several in towards.items()}).save(OUT)
    for name, value in measured.items():
        print(f"| {name} | {value:.3f} |")


if __name__ == "__main__":
    main()
