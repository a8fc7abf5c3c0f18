"""Steering: a feature map moved along a concept, and its reconstructions on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.explore.concepts import Concepts
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
from featinv_pl.types import predicted

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

    @property
    def concept(self) -> str:
        return self.concepts.names[self.number]

    @cached_property
    def scores(self) -> Tensor:
        """(S, n), how strongly the images express the concept."""
        return torch.stack([self._scores(features) for features in self.found["features"]])

    @property
    def original_score(self) -> float:
        return self._scores(self.originals["features"]).item()

    def _scores(self, features: Tensor) -> Tensor:
        return self.concepts.score(features, self.weight)[:, self.number]

    @property
    def spearman(self) -> float | None:
        """Rank correlation of strength and score, averaged over samples; None where it is not defined."""
        if len(self.strengths) < 2 or bool((self.scores == self.scores[0]).all(0).any()):
            return None
        ranks = [spearmanr(self.strengths, scores).statistic for scores in self.scores.T.tolist()]
        return float(sum(ranks) / len(ranks))

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
        return (
            f"The picture's feature map was edited ({self.edit} the concept {self.concept}) at {len(self.strengths)} "
            "strengths, and reconstructed from the same noise. Score and classes are measured on the reconstructions, "
            "which the classifier reads as bytes, not on the edited map. The rank correlation (Spearman) of strength "
            f"and score {rank}."
        )

    def sections(self) -> list[Section]:
        [picture], [expected] = self.originals["images"], self.originals["logits"]
        original = tile(picture, expected, "the picture", f"score {self.original_score:.2f}")
        samples = (values.unbind(1) for values in (self.found["images"], self.scores, self.found["logits"]))
        rows = [
            [
                tile(image, logits, f"{strength:+g}", f"score {score:.2f}", expected=expected)
                for strength, image, score, logits in zip(self.strengths, *sample, strict=True)
            ]
            for sample in zip(*samples, strict=True)
        ]
        text = "Below each image its strength, score and predicted class, in red where that is not the picture's."
        return [
            Section("Reconstructions", text, [[original, *rows[0]], *rows[1:]]),
            Section("Score of the concept in the images", plot=self._plot_scores),
            Section("Probabilities of classes in the images", plot=self._plot_classes),
        ]

    def _plot_scores(self, axes: Axes) -> None:
        axes.plot(self.strengths, self.scores.numpy(), color="tab:blue", alpha=0.3, linewidth=1)
        axes.plot(self.strengths, self.scores.mean(1).numpy(), color="tab:blue", marker=".")
        axes.axhline(self.original_score, color="grey", linestyle=":", label="the picture")
        axes.set(xlabel="strength", ylabel=f"score of {self.concept}")
        axes.legend(fontsize="small")

    def _plot_classes(self, axes: Axes) -> None:
        means = {name: values.mean(1) for name, values in self.probabilities.items()}
        plot_probabilities(axes, self.strengths, means, "strength")

    def facts(self) -> dict[str, Any]:
        return {
            "concept": self.concept,
            "edit": self.edit,
            "spearman": self.spearman,
            "picture": {"score": self.original_score, "prediction": prediction(self.originals["logits"][0])},
            "steps": [
                {
                    "strength": strength,
                    "scores": self.scores[step].tolist(),
                    "predictions": [prediction(logits) for logits in self.found["logits"][step]],
                    "probabilities": {name: values[step].tolist() for name, values in self.probabilities.items()},
                }
                for step, strength in enumerate(self.strengths)
            ],
        }


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
) -> Steering:
    """Reconstruct a picture's map as it is moved along a concept, at all strengths from the same noise.

    A strength is, for `add`, a multiple of the direction; for `scale`, a factor of what an NMF component contributes;
    for `remove`, the fraction of it that is taken away. `mask` (H, W) in [0, 1], of the size that the classifier reads,
    is the region to edit. The probabilities of `classes` are shown besides those of the predicted classes.
    """
    refuse_other_backbone(concepts.origin, pipeline, "`concepts`")
    if edit != "add" and concepts.method != "nmf":
        raise UserError(
            f"`edit`: only a component of an NMF contributes a part that {edit} can act on, and these concepts were "
            f"found by '{concepts.method}'. Use add, or concepts that were found by nmf."
        )
    original = classify(pipeline, [picture])
    [features], num_classes = original["features"], original["logits"].shape[1]
    for index in classes:
        if not 0 <= index < num_classes:
            raise UserError(f"`class`: there is no class {index}; the classifier has {num_classes}, from 0.")
    weight = torch.ones(features.shape[-2:]) if mask is None else location_weights(mask, features)
    part = concepts.directions[concept] if edit == "add" else concepts.part(original["features"], concept)[0]
    amounts = {"add": strengths, "scale": [one - 1 for one in strengths], "remove": [-one for one in strengths]}
    maps = torch.stack([features + amount * weight * part for amount in amounts[edit]])
    if not bool((maps.abs() <= LARGEST).all()):  # false for NaN, too
        raise UserError(
            f"`strengths`: the edited map reaches {maps.abs().max().item():.3g}, and half precision ends at "
            f"{LARGEST:.0f}. Give smaller values."
        )
    found = reconstruct_maps(pipeline, maps, num_samples, seed)
    likely = torch.cat([predicted(original["logits"]), predicted(found["logits"]).flatten()]).tolist()
    shown = list(dict.fromkeys([*classes, *likely] if num_classes else []))[: max(SHOWN_CLASSES, len(classes))]
    return Steering(original, found, concepts, concept, edit, list(strengths), weight, shown)
