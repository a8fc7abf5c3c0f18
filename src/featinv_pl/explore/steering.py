"""Steering: a feature map moved along a concept, its reconstructions on the way, and those of control edits."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.explore.concepts import ADDITIVE, Concepts
from featinv_pl.explore.effects import EDIT, EXPLAINED, LABELS, SCORE, control_parts, effects, plot_arms
from featinv_pl.explore.exploration import (
    Exploration,
    classify,
    location_weights,
    reconstruct_maps,
    refuse_other_backbone,
    tile,
)
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.pages.page import Section, class_name, plot_probabilities, prediction
from featinv_pl.types import Observation, predicted

Edit = Literal["add", "scale", "remove"]
SHOWN_CLASSES = 5
LARGEST = torch.finfo(torch.half).max  # maps are stored in half precision, and computed so on GPUs


@dataclass(frozen=True)
class Steering(Exploration):
    """Reconstructions of a picture's map at each strength of an edit."""

    name = "steering"

    concepts: Concepts
    number: int  # of the concept that was used
    edit: Edit
    strengths: list[float]  # S
    weight: Tensor  # (h, w), the share of each location that was edited; scores are measured there
    classes: list[int]  # whose probabilities are shown
    asked: list[int]  # those of them that were asked for
    goals: Tensor  # (S,), by how much the edit changes the map's score
    plain: Observation  # n reconstructions of the map as it is, from the same noise
    controls: dict[str, Observation]  # by name, as `found`, for edits of equal norm in other directions

    @property
    def concept(self) -> str:
        return self.concepts.names[self.number]

    @cached_property
    def effects(self) -> dict[str, dict[str, Tensor]]:
        """Each measure (S, n), for the edit and for each control; see `effects`."""
        edited = self.concepts, self.number, self.weight, self.originals, self.plain
        return {
            name: effects(*edited, found, self.goals, self.asked)
            for name, found in {EDIT: self.found, **self.controls}.items()
        }

    @cached_property
    def unedited(self) -> dict[str, Tensor]:
        """Each measure (n,) of the reconstructions of the map as it is."""
        still = Observation(
            images=self.plain["images"][None], features=self.plain["features"][None], logits=self.plain["logits"][None]
        )
        edited = self.concepts, self.number, self.weight, self.originals, self.plain
        return {name: one[0] for name, one in effects(*edited, still, torch.zeros(1), self.asked).items()}

    @property
    def scores(self) -> Tensor:
        """(S, n), how strongly the images express the concept."""
        return self.effects[EDIT][SCORE]

    @property
    def original_score(self) -> float:
        return self.concepts.score(self.originals["features"], self.weight)[0, self.number].item()

    @property
    def spearman(self) -> float | None:
        """Rank correlation of strength and score, averaged over samples; None where it is not defined."""
        return rank_correlation(self.strengths, self.scores)

    @property
    def probabilities(self) -> dict[str, Tensor]:
        """(S, n), of the classes that are shown, by name."""
        shares = self.found["logits"].float().softmax(-1)
        return {class_name(index, shares.shape[-1]): shares[:, :, index] for index in self.classes}

    @property
    def title(self) -> str:
        return f"Steering: {self.edit} {self.concept}"

    @property
    def lead(self) -> str:
        rank = "is not defined" if self.spearman is None else f"is {self.spearman:.2f}"
        text = (
            f"The picture's feature map was edited ({self.edit} the concept {self.concept}) at {len(self.strengths)} "
            "strengths, and reconstructed from the same noise. Score and classes are measured on the reconstructions, "
            "which the classifier reads as bytes, not on the edited map. The rank correlation (Spearman) of strength "
            f"and score {rank}."
        )
        if self.controls:
            step = furthest(self.goals)
            scores = [f"{name} {one[SCORE][step].mean():.2f}" for name, one in self.effects.items()]
            text += f" Scores at strength {self.strengths[step]:g}: {', '.join(scores)}"
            text += f"; unedited {self.unedited[SCORE].mean():.2f}."
        return f"{text} {self.concepts.note}".rstrip()

    def sections(self) -> list[Section]:
        [picture], [expected] = self.originals["images"], self.originals["logits"]
        original = tile(picture, expected, "the picture", f"score {self.original_score:.2f}")
        rows = self._rows(self.found, EDIT)
        text = "Below each image its strength, score and predicted class, marked where that is not the picture's."
        found = [
            Section("Reconstructions", text, [[original, *rows[0]], *rows[1:]]),
            *(
                Section(f"Control: {name}", "An edit of equal norm, from the same noise.", self._rows(one, name)[:1])
                for name, one in self.controls.items()
            ),
        ]
        for measure in self.unedited:
            title = LABELS[measure].capitalize()
            about = EXPLAINED if measure == SCORE else ""
            found.append(Section(title, about, plot=partial(self._plot, measure=measure)))
        return [*found, Section("Probabilities of classes in the images", plot=self._plot_classes)]

    def _rows(self, found: Observation, name: str) -> list[list[Any]]:
        """Tiles of the images at all strengths, for each sample."""
        [expected] = self.originals["logits"]
        samples = (values.unbind(1) for values in (found["images"], self.effects[name][SCORE], found["logits"]))
        return [
            [
                tile(image, logits, f"{strength:+g}", f"score {score:.2f}", expected=expected)
                for strength, image, score, logits in zip(self.strengths, *sample, strict=True)
            ]
            for sample in zip(*samples, strict=True)
        ]

    def _plot(self, axes: Axes, measure: str) -> None:
        arms = {name: one[measure] for name, one in self.effects.items()}
        bands = {name: (values.amin(1).tolist(), values.amax(1).tolist()) for name, values in arms.items()}
        means = {name: values.mean(1) for name, values in arms.items()}
        plot_arms(axes, self.strengths, measure, means, self.unedited[measure].mean().item(), bands)

    def _plot_classes(self, axes: Axes) -> None:
        means = {name: values.mean(1) for name, values in self.probabilities.items()}
        plot_probabilities(axes, self.strengths, means, "strength")

    def facts(self) -> dict[str, Any]:
        controls = {name: found for name, found in self.effects.items() if name != EDIT}
        return {
            "concept": self.concept,
            "edit": self.edit,
            "spearman": self.spearman,
            "picture": {"score": self.original_score, "prediction": prediction(self.originals["logits"][0])},
            "unedited": {name: values.tolist() for name, values in self.unedited.items()},
            "steps": [
                {
                    "strength": strength,
                    "scores": self.scores[step].tolist(),
                    "predictions": [prediction(logits) for logits in self.found["logits"][step]],
                    "probabilities": {name: values[step].tolist() for name, values in self.probabilities.items()},
                    "effects": {name: values[step].tolist() for name, values in self.effects[EDIT].items()},
                    "controls": {
                        name: {measure: values[step].tolist() for measure, values in found.items()}
                        for name, found in controls.items()
                    },
                }
                for step, strength in enumerate(self.strengths)
            ],
        }


def rank_correlation(strengths: Sequence[float], scores: Tensor) -> float | None:
    """Spearman's, of strengths and scores (S, n), averaged over n; None where it is not defined."""
    if len(strengths) < 2 or bool((scores == scores[0]).all(0).any()):
        return None
    ranks = [spearmanr(strengths, column).statistic for column in scores.T.tolist()]
    return float(sum(ranks) / len(ranks))


def furthest(goals: Tensor) -> int:
    """The step at which the edit (S,) changes the map most; of two that do so equally, the later."""
    return len(goals) - 1 - int(goals.abs().flip(0).argmax())


def steer(
    pipeline: FeatInvPipeline,
    picture: Image.Image,
    concepts: Concepts,
    concept: int,
    strengths: Sequence[float],
    edit: Edit = "add",
    mask: Tensor | None = None,
    classes: Sequence[int] = (),
    num_samples: int = 1,
    seed: int = 0,
    controls: bool = True,
) -> Steering:
    """Reconstruct a picture's map as it is moved along a concept, at all strengths from the same noise.

    A strength is, for `add`, a multiple of the direction; for `scale`, a factor of what an NMF component contributes;
    for `remove`, the fraction of it that is taken away. `mask` (H, W) in [0, 1], of the size that the classifier reads,
    is the region to edit. The probabilities of `classes` are shown besides those of the predicted classes. With
    `controls`, the map is moved as far in a random direction and in that of another concept, too.
    """
    return steer_map(
        pipeline, classify(pipeline, [picture]), concepts, concept, strengths, edit, mask, classes, num_samples, seed,
        controls,
    )  # fmt: skip


def steer_map(
    pipeline: FeatInvPipeline,
    original: Observation,
    concepts: Concepts,
    concept: int,
    strengths: Sequence[float],
    edit: Edit,
    mask: Tensor | None,
    classes: Sequence[int],
    num_samples: int,
    seed: int,
    controls: bool,
) -> Steering:
    """Do what `steer` does, for a picture that `classify` has classified."""
    refuse_other_backbone(concepts.origin, pipeline, "`concepts`")
    if edit != "add" and concepts.method not in ADDITIVE:
        raise UserError(
            f"`edit`: only a component of an NMF contributes a part that {edit} can act on, and these concepts were "
            f"found by '{concepts.method}'. Use add, or concepts that were found by nmf."
        )
    [features], num_classes = original["features"], original["logits"].shape[1]
    for index in classes:
        if not 0 <= index < num_classes:
            raise UserError(f"`class`: there is no class {index}; the classifier has {num_classes}, from 0.")
    weight = torch.ones(features.shape[-2:]) if mask is None else location_weights(mask, features)
    part = concepts.directions[concept] if edit == "add" else concepts.part(original["features"], concept)[0]
    amounts = {"add": [*strengths], "scale": [one - 1 for one in strengths], "remove": [-one for one in strengths]}
    parts = {EDIT: part} | (control_parts(concepts, concept, features, part, weight, seed) if controls else {})
    maps = [features]  # an amount of 0 is this map, for every part
    places: dict[str, list[int]] = {}
    for name, one in parts.items():
        moved = [features + amount * weight * one for amount in amounts[edit] if amount]
        numbers = iter(range(len(maps), len(maps) + len(moved)))
        places[name] = [next(numbers) if amount else 0 for amount in amounts[edit]]
        maps += moved
    stacked = torch.stack(maps)
    if not bool((stacked.abs() <= LARGEST).all()):  # false for NaN, too
        raise UserError(
            f"`strengths`: the edited map reaches {stacked.abs().max().item():.3g}, and half precision ends at "
            f"{LARGEST:.0f}. Give smaller values."
        )
    score = concepts.score(stacked[[0, *places[EDIT]]], weight)[:, concept]
    drawn = reconstruct_maps(pipeline, stacked, num_samples, seed)
    found = {name: _steps(drawn, one) for name, one in places.items()}
    edited = found.pop(EDIT)
    likely = torch.cat([predicted(original["logits"]), predicted(edited["logits"]).flatten()]).tolist()
    shown = list(dict.fromkeys([*classes, *likely] if num_classes else []))[: max(SHOWN_CLASSES, len(classes))]
    plain = _steps(drawn, 0)
    return Steering(
        original, edited, concepts, concept, edit, list(strengths), weight, shown, [*classes], score[1:] - score[0],
        plain, found,
    )  # fmt: skip


def _steps(drawn: Observation, index: int | list[int]) -> Observation:
    return {"images": drawn["images"][index], "features": drawn["features"][index], "logits": drawn["logits"][index]}
