"""Steering: a feature map moved along a concept, and its reconstructions on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from matplotlib.axes import Axes
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from featinv_pl.errors import UserError
from featinv_pl.explore.concepts import Concepts
from featinv_pl.explore.edits import add, location_weights, refuse_overflow, scale
from featinv_pl.explore.reconstruct import reconstruct_maps, tile
from featinv_pl.explore.samples import refuse_other_backbone
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.pages.page import Report, Section, plot_probabilities
from featinv_pl.pages.pictures import class_name, prediction
from featinv_pl.types import predicted

Edit = Literal["add", "scale", "remove"]
SHOWN_CLASSES = 5


@dataclass(frozen=True)
class Steering(Report):
    """Reconstructions of a map at each strength of an edit, all from the same noise.

    Attributes:
        concept: Its name.
        edit: What was done to the map.
        strengths: How much of it (S).
        original: (3, H, W), the picture.
        original_logits: (K,).
        original_score: How strongly the picture expresses the concept.
        images: (S, n, 3, H, W) in [-1, 1], as bytes would hold them.
        scores: (S, n), measured on the images.
        logits: (S, n, K), measured on the images.
        classes: Whose probabilities are shown.
    """

    name: ClassVar[str] = "steering"

    concept: str
    edit: Edit
    strengths: list[float]
    original: Tensor
    original_logits: Tensor
    original_score: float
    images: Tensor
    scores: Tensor
    logits: Tensor
    classes: list[int]

    @property
    def spearman(self) -> float | None:
        """Rank correlation of strength and score, averaged over samples; None where it is not defined."""
        if len(self.strengths) < 2 or bool((self.scores == self.scores[0]).all(0).any()):
            return None
        ranks = [spearmanr(self.strengths, scores).statistic for scores in self.scores.T.tolist()]
        return float(sum(ranks) / len(ranks))

    @property
    def probabilities(self) -> Tensor:
        """(S, n, K)."""
        return self.logits.float().softmax(-1)

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
        original = tile(self.original, self.original_logits, "the picture", f"score {self.original_score:.2f}")
        rows = [
            [
                tile(image, logits, f"{strength:+g}", f"score {score:.2f}", expected=self.original_logits)
                for strength, image, score, logits in zip(self.strengths, *sample, strict=True)
            ]
            for sample in zip(self.images.unbind(1), self.scores.unbind(1), self.logits.unbind(1), strict=True)
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
        means = {name: values.mean(1) for name, values in self._shown().items()}
        plot_probabilities(axes, self.strengths, means, "strength")

    def _shown(self) -> dict[str, Tensor]:
        """Probabilities (S, n) of the classes that are shown, by name."""
        return {class_name(index, self.logits.shape[-1]): self.probabilities[:, :, index] for index in self.classes}

    def facts(self) -> dict[str, Any]:
        return {
            "concept": self.concept,
            "edit": self.edit,
            "spearman": self.spearman,
            "picture": {"score": self.original_score, "prediction": prediction(self.original_logits)},
            "steps": [
                {
                    "strength": strength,
                    "scores": self.scores[step].tolist(),
                    "predictions": [prediction(logits) for logits in self.logits[step]],
                    "probabilities": {name: values[step].tolist() for name, values in self._shown().items()},
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

    Raises:
        UserError: Concepts of another backbone, an edit that does not suit them, strengths beyond half precision.
    """
    refuse_other_backbone(concepts.origin, pipeline, "`concepts`")
    if edit != "add" and concepts.method != "nmf":
        raise UserError(
            f"`edit`: only a component of an NMF contributes a part that {edit} can act on, and these concepts were "
            f"found by '{concepts.method}'. Use add, or concepts that were found by nmf."
        )
    original = pipeline.classify(pipeline.crop([picture]))
    features, num_classes = original["features"], original["logits"].shape[1]
    for index in classes:
        if not 0 <= index < num_classes:
            raise UserError(f"`class`: there is no class {index}; the classifier has {num_classes}, from 0.")
    weight = torch.ones(features.shape[-2:])
    if mask is not None:
        weight = location_weights(mask, (features.shape[-2], features.shape[-1]))
    maps = [_edited(features, concepts, concept, strength, edit, weight.to(features))[0] for strength in strengths]
    refuse_overflow(torch.stack(maps), "`strengths`")
    found = reconstruct_maps(pipeline, maps, num_samples, seed)
    likely = torch.cat([predicted(original["logits"]).cpu(), predicted(found["logits"]).flatten()]).tolist()
    shown = list(dict.fromkeys([*classes, *likely] if num_classes else []))[: max(SHOWN_CLASSES, len(classes))]
    return Steering(
        concepts.names[concept],
        edit,
        list(strengths),
        original["images"][0].cpu(),
        original["logits"][0].cpu(),
        concepts.score(features, weight)[0, concept].item(),
        found["images"],
        torch.stack([concepts.score(features, weight)[:, concept] for features in found["features"]]),
        found["logits"],
        shown,
    )


def _edited(features: Tensor, concepts: Concepts, concept: int, strength: float, edit: Edit, weight: Tensor) -> Tensor:
    if edit == "add":
        return add(features, concepts.directions[concept].to(features), strength, weight)
    factor = strength if edit == "scale" else 1 - strength
    return scale(features, concepts.part(features, concept), factor, weight)
