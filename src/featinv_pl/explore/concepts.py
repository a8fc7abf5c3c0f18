"""Concepts: directions in feature space that mean something, found in the maps of real images."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from scipy.optimize import nnls
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from torch import Tensor
from typing_extensions import TypedDict  # that of Python 3.11 is too old for pydantic

from featinv_pl.errors import UserError
from featinv_pl.explore.exploration import Origin, Samples
from featinv_pl.files import read_bytes, read_json, write_bytes

Method = Literal["nmf", "difference", "cav", "sae"]
ADDITIVE = ("nmf", "sae")  # methods whose concepts each contribute a part to a map
TENSORS, FACTS = "concepts.safetensors", "concepts.json"
UNIT_QUANTILE = 0.99  # of an NMF component's activations: strength 1
FOLDS = 5
BATCH = 256  # maps at a time


class Facts(TypedDict):
    """The content of `concepts.json`; for the sum see `seal`."""

    method: Method
    names: list[str]
    scores: dict[str, float]
    origin: Origin
    sha256: str


FACTS_TYPE = TypeAdapter(Facts)


def seal(tensors: bytes, facts: Mapping[str, Any]) -> str:
    """The SHA-256 in `concepts.json`: of the tensors and of the facts about them."""
    rest = {name: value for name, value in facts.items() if name != "sha256"}
    return hashlib.sha256(tensors + json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Concepts:
    """Directions in the feature space of one backbone and layer.

    Strength 1 is, for a difference or a concept vector, the way from the first group's mean to the second's (along the
    vector); for an NMF component, the activation that only one location in a hundred exceeds.
    """

    method: Method
    names: list[str]
    directions: Tensor  # (K, C, h, w), or (K, C, 1, 1) where a direction is the same at all locations
    starts: Tensor  # of that shape, the point whose score is 0: the first group's mean or zero
    scores: dict[str, float]  # by name, a vector's cross-validated accuracy, or the energy's share that NMF explains
    origin: Origin  # of the maps that they were found in, or are used with
    encoder: Tensor | None = None  # (K, C + 1), weights and bias of a sparse autoencoder, whose ReLU is an activation
    note: str = ""  # what a page is to say about where they come from

    def number(self, concept: str) -> int:
        """The number of a concept, given by number or name."""
        if concept in self.names:
            return self.names.index(concept)
        if concept.isdecimal() and int(concept) < len(self.names):
            return int(concept)
        known = ", ".join(f"{number} ({name})" for number, name in enumerate(self.names))
        raise UserError(f"`concept`: there is no concept '{concept}'. Give one of {known}.")

    def activations(self, features: Tensor) -> Tensor:
        """How strongly each location of maps (B, C, h, w) expresses each concept, in units of strength: (B, K, h, w).

        NMF: the component's coefficient in the non-negative combination of all components that comes closest.
        Sparse autoencoder: what its encoder says.
        Otherwise the projection onto the direction, from its start; its mean over locations is the score.
        """
        if self.method == "nmf":
            return coefficients_of(features, self.directions)
        if self.encoder is not None:
            weights, bias = self.encoder[:, :-1], self.encoder[:, -1, None, None]
            return (torch.einsum("bchw,kc->bkhw", features, weights) + bias).relu()
        scaled = self.directions / self.directions.square().sum(1, keepdim=True).mean((2, 3), keepdim=True)
        projected = torch.einsum("bchw,kchw->bkhw", features, scaled.expand(-1, *features.shape[1:]))
        return projected - (self.starts * scaled).sum(1)

    def score(self, features: Tensor, weight: Tensor) -> Tensor:
        """The strength at which maps (B, C, h, w) express each concept within a weight (h, w) in [0, 1]: (B, K)."""
        mean = (self.activations(features) * weight).sum((2, 3)) / weight.sum()
        if self.method in ADDITIVE:
            return mean
        energy = self.directions.square().sum(1).expand(-1, *weight.shape)
        return mean * energy.mean((1, 2)) * weight.sum() / (energy * weight).sum((1, 2))

    def part(self, features: Tensor, number: int) -> Tensor:
        """The contribution of a component of an NMF or a sparse autoencoder to maps (B, C, h, w), of the same shape."""
        return self.activations(features)[:, number, None] * self.directions[number]

    def save(self, folder: Path) -> None:
        tensors = {"directions": self.directions, "starts": self.starts}
        tensors |= {} if self.encoder is None else {"encoder": self.encoder}
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        facts = {"method": self.method, "names": self.names, "scores": self.scores, "origin": self.origin}
        text = json.dumps({**facts, "sha256": seal(data, facts)}, indent=2) + "\n"
        write_bytes(folder / TENSORS, data)
        write_bytes(folder / FACTS, text.encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; the path is that of the folder, or of either file."""
        folder = path.parent if path.is_file() else path
        advice = "Give a folder that `featinv-pl concepts` wrote, with both of its files as they were."
        data = read_bytes(folder / TENSORS, "`concepts`", advice)
        contents = read_json(folder / FACTS, "`concepts`", advice)
        try:
            facts = FACTS_TYPE.validate_python(contents)
            if seal(data, contents) != facts["sha256"]:
                raise ValueError(f"{TENSORS} and {FACTS} are not as they were written together")
            tensors = load(data)
            directions, starts = tensors["directions"].float(), tensors["starts"].float()
            encoder = tensors["encoder"].float() if facts["method"] == "sae" else None
            _check_shapes(facts, directions, starts, encoder)
        except (ValidationError, SafetensorError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"`concepts`: those in '{folder}' are damaged ({reason}). {advice}") from error
        return cls(facts["method"], facts["names"], directions, starts, facts["scores"], facts["origin"], encoder)


def _check_shapes(facts: Facts, directions: Tensor, starts: Tensor, encoder: Tensor | None) -> None:
    shape = facts["origin"]["feature_shape"]
    grids = ([1, 1],) if facts["method"] in ADDITIVE else ([1, 1], shape[1:])
    number, *channels_and_grid = directions.shape or (0,)
    if number != len(facts["names"]) or not number or channels_and_grid not in [[*shape[:1], *grid] for grid in grids]:
        raise ValueError(f"{len(facts['names'])} directions of shape {list(directions.shape)} for maps of {shape}")
    if starts.shape != directions.shape or not (directions.isfinite().all() and starts.isfinite().all()):
        raise ValueError("starts of another shape than directions, or values that are not finite")
    if not directions.flatten(1).any(1).all():
        raise ValueError("a direction that is zero")
    if encoder is not None and (encoder.shape != (number, shape[0] + 1) or not encoder.isfinite().all()):
        raise ValueError(f"an encoder of shape {list(encoder.shape)} for {number} directions in maps of {shape}")


def nmf_concepts(samples: Samples, num_concepts: int, seed: int = 0) -> Concepts:
    """Parts of which the feature vectors at all locations are sums, by non-negative matrix factorisation.

    A layer that has negative values too is factorised as its positive and its negative part side by side; a
    component's direction is the difference of its two halves.
    """
    maps = samples.maps()
    locations = maps.movedim(1, -1).flatten(0, 2)
    channels = locations.shape[1]
    if not 1 <= num_concepts <= min(locations.shape):
        raise UserError(
            f"`num_concepts`: {num_concepts} components cannot be found in {len(locations)} locations of {channels} "
            f"channels. Give a number from 1 to {min(locations.shape)}."
        )
    signed = bool((locations < 0).any())
    factorisation = NMF(num_concepts, init="nndsvda", max_iter=500, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the explained share tells how far it came
        factorisation.fit((_halves(locations) if signed else locations).numpy())
    components = torch.from_numpy(factorisation.components_).float()
    if signed:
        components = components[:, :channels] - components[:, channels:]
    return nmf_of(components[..., None, None], samples, [f"part {number}" for number in range(num_concepts)])


def nmf_of(components: Tensor, samples: Samples, names: list[str]) -> Concepts:
    """Components (K, C, 1, 1) of an NMF as concepts, in units of how strongly images express them."""
    maps = samples.maps()
    coefficients = coefficients_of(maps, components)
    units = np.quantile(coefficients.numpy(), UNIT_QUANTILE, axis=(0, 2, 3))
    missing = maps - torch.einsum("bkhw,kc->bchw", coefficients, components[..., 0, 0])
    scales = torch.from_numpy(units).float().clamp(min=torch.finfo(torch.float).tiny)
    directions = components * scales.view(-1, 1, 1, 1)
    explained = {"explained": round(1 - (missing.square().sum() / maps.square().sum()).item(), 4)}
    return Concepts("nmf", names, directions, torch.zeros_like(directions), explained, samples.origin)


def _halves(vectors: Tensor) -> Tensor:
    """The positive and the negative part of vectors (n, C) side by side, (n, 2 C)."""
    return torch.cat([vectors, -vectors], dim=1).clamp(min=0)


def coefficients_of(features: Tensor, directions: Tensor) -> Tensor:
    """Non-negative coefficients (B, K, h, w) of components (K, C, 1, 1), by least squares at each location of maps.

    Positive and negative parts are explained side by side, as they were factorised: components do not cancel.
    """
    locations = _halves(features.movedim(1, -1).flatten(0, 2).cpu().double())
    # An orthonormal basis of the components leaves problems of K unknowns in K equations.
    basis, reduced = torch.linalg.qr(_halves(directions.flatten(1).double()).T)
    targets = (locations @ basis).numpy()
    solved = np.stack([nnls(reduced.numpy(), target)[0] for target in targets])
    shape = (len(features), *features.shape[2:], len(directions))
    return torch.from_numpy(solved).float().reshape(shape).movedim(-1, 1)


def difference_concepts(samples: Samples, pairs: Sequence[tuple[str, Tensor, Tensor]], pooled: bool) -> Concepts:
    """Directions from the mean map of one group of images to that of another.

    A pair is a name and which samples (n,) are in each group. A pooled direction is the same at all locations.
    """
    maps = samples.maps(pooled)
    means = [(maps[first].mean(0), maps[second].mean(0)) for _, first, second in pairs]
    directions = torch.stack([second - first for first, second in means])
    for (name, *_), direction in zip(pairs, directions, strict=True):
        if not 0 < direction.norm() < torch.inf:
            raise UserError(f"the two groups of '{name}' have the same mean map, or not a finite one. Give others.")
    starts = torch.stack([first for first, _ in means])
    return Concepts("difference", [name for name, *_ in pairs], directions, starts, {}, samples.origin)


def activation_vectors(samples: Samples, pairs: Sequence[tuple[str, Tensor, Tensor]], pooled: bool) -> Concepts:
    """Concept activation vectors: normals of the planes that separate two groups of images best.

    Kim et al. (Interpretability Beyond Feature Attribution, arXiv 1711.11279), with logistic regression as
    the linear classifier. Pairs and `pooled` are as for `difference_concepts`.
    """
    differences = difference_concepts(samples, pairs, pooled)
    maps = samples.maps(pooled)
    directions, scores = [], {}
    for (name, first, second), difference in zip(pairs, differences.directions, strict=True):
        folds = min(FOLDS, int(first.sum()), int(second.sum()))
        if folds < 2:
            raise UserError(f"`method` cav: '{name}' has a group of a single image. Give at least two of each.")
        points = torch.cat([maps[first], maps[second]]).flatten(1)
        points = (points - points.mean(0)) / points.std()
        sides = np.repeat([0, 1], [int(first.sum()), int(second.sum())])
        classifier = LogisticRegression(max_iter=1000)
        splits = StratifiedKFold(folds, shuffle=True, random_state=0)
        scores[name] = round(float(cross_val_score(classifier, points.numpy(), sides, cv=splits).mean()), 4)
        normal = torch.from_numpy(classifier.fit(points.numpy(), sides).coef_[0]).float().reshape_as(difference)
        directions.append(normal * (difference * normal).sum() / normal.square().sum())
    return Concepts("cav", differences.names, torch.stack(directions), differences.starts, scores, samples.origin)


def pairs_of_labels(
    samples: Samples, labels: Sequence[tuple[int | str, int | str]]
) -> list[tuple[str, Tensor, Tensor]]:
    """Groups by class, for pairs of labels or of names of class folders."""
    return [(f"{first}-{second}", samples.of_class(first), samples.of_class(second)) for first, second in labels]


def pair_of_sets(samples: Samples) -> list[tuple[str, Tensor, Tensor]]:
    """Groups by shard set, of two sets."""
    sets = list({id(shards): shards for shards, _ in samples.places}.values())
    if len(sets) != 2:
        raise UserError(
            f"SHARDS: without `between`, two shard sets are compared, and {len(sets)} given. "
            "Give two, or the labels of two classes."
        )
    first = torch.tensor([shards is sets[0] for shards, _ in samples.places])
    return [("-".join(shards.source for shards in sets), first, ~first)]
