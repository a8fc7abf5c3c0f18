"""What an edit of a map changes in the images drawn from it: the concept that was asked for, and all else."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn.functional import interpolate

from featinv_pl.explore.concepts import Concepts
from featinv_pl.sampling.noise import generator
from featinv_pl.types import Observation, predicted

EDIT, RANDOM, OTHER = "edit", "random direction", "other concept"
SCORE, REACHED, CLASSIFIED = "score", "reached", "classified"
OTHERS, CLASSES, DISTANCE = "other concepts", "other classes", "distance"
LABELS = {
    SCORE: "score of the concept",
    REACHED: "share that reaches the concept",
    CLASSIFIED: "share classified as asked for",
    OTHERS: "change of other concepts' scores",
    CLASSES: "probability of other classes",
    DISTANCE: "distance to the picture",
}
"""Measures of an image; `EXPLAINED` says what they are."""
EXPLAINED = (
    "Reached: the image's score has changed by at least half of what the edit changed the map's by. Other concepts: "
    "the mean absolute change of their scores from the unedited reconstruction. Other classes: the probability of "
    "classes other than the picture's and those asked for (`class`). Distance: root mean square over pixels in [0, 1]."
)
STYLES = {EDIT: ("tab:blue", "-"), RANDOM: ("grey", "--"), OTHER: ("tab:orange", ":")}
HALF = 0.5  # of what the edit changes the map's score by, which an image that reaches the concept must change by


def control_parts(
    concepts: Concepts, number: int, features: Tensor, edited: Tensor, weight: Tensor, seed: int
) -> dict[str, Tensor]:
    """What edits of equal norm add to a map (C, h, w) in place of the part `edited` (C, h, w) or (C, 1, 1).

    Norms are equal where `weight` (h, w) says that the map is edited.

    The random direction is as constant over locations as the concept's own, with the norm of `edited` at each; that of
    another concept is the one least similar to the concept's (by absolute cosine) that the map has something of.
    There is none if there is no other concept.
    """
    direction = concepts.directions[number]
    noise = torch.randn(direction.shape, generator=generator("random direction", seed))
    parts = {RANDOM: noise / noise.norm(dim=0) * edited.norm(dim=0)}
    flat = concepts.directions.flatten(1)
    order = torch.cosine_similarity(flat, flat[number, None]).abs().argsort().tolist()
    others = [(other, concepts.directions[other]) for other in order if other != number]
    if edited.shape != direction.shape:  # a part of the map: in place of it what others contribute, if they do
        contributed = [(other, concepts.part(features[None], other)[0]) for other, _ in others]
        others = [*contributed, *others]
    for other, part in others:
        if (norm := (weight * part).norm()) > 0:
            return parts | {f"{OTHER}: {concepts.names[other]}": part * (weight * edited).norm() / norm}
    return parts


def effects(
    concepts: Concepts,
    number: int,
    weight: Tensor,
    picture: Observation,
    plain: Observation,
    found: Observation,
    goals: Tensor,
    asked: Sequence[int],
) -> dict[str, Tensor]:
    """Each measure (S, n) of images drawn from S maps of one picture.

    Args:
        concepts: Of which `number` was edited, where `weight` (h, w) says.
        number: Of the concept that was edited.
        weight: Of locations, in [0, 1].
        picture: As classified: images (1, 3, H, W).
        plain: Reconstructions of its map as it is, from the same n noises: images (n, 3, H, W).
        found: Reconstructions of the changed maps: images (S, n, 3, H, W).
        goals: (S,), by how much the edit changes the map's score.
        asked: The classes that were asked for.
    """
    before = concepts.score(plain["features"], weight)
    after = torch.stack([concepts.score(features, weight) for features in found["features"]])
    goal, score = goals[:, None], after[..., number]
    gained = (score - before[:, number]) * goal.sign()
    measures = {SCORE: score, REACHED: ((gained >= HALF * goal.abs()) & (goal != 0)).float()}
    if len(concepts.names) > 1:
        rest = [other for other in range(len(concepts.names)) if other != number]
        measures[OTHERS] = (after - before)[..., rest].abs().mean(-1)
    if found["logits"].shape[-1]:
        kept = {*predicted(picture["logits"]).tolist(), *asked}
        measures[CLASSES] = 1 - found["logits"].float().softmax(-1)[..., sorted(kept)].sum(-1)
        if asked:
            measures[CLASSIFIED] = torch.isin(predicted(found["logits"]), torch.tensor([*asked])).float()
    original = picture["images"]
    if original.shape[-2:] != found["images"].shape[-2:]:
        original = interpolate(original, found["images"].shape[-2:], mode="bicubic", antialias=True).clamp(-1, 1)
    measures[DISTANCE] = ((found["images"] - original) / 2).square().mean((-3, -2, -1)).sqrt()
    return {name: measures[name] for name in LABELS if name in measures}


def plot_arms(
    axes: Axes,
    strengths: Sequence[float],
    measure: str,
    arms: Mapping[str, Tensor],
    unedited: float,
    bands: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    """Plot a measure (S,) by strength for the edit and its controls, with a band for each."""
    for name, values in arms.items():
        color, style = STYLES[name.partition(":")[0]]
        axes.plot(strengths, values.numpy(), style, color=color, marker=".", label=name)
        low, high = bands[name]
        axes.fill_between(strengths, low, high, color=color, alpha=0.15, linewidth=0)
    if measure != REACHED:
        axes.axhline(unedited, color="black", linewidth=0.6, label="unedited")
    axes.set(xlabel="strength", ylabel=LABELS[measure])
    axes.legend(fontsize="x-small")
