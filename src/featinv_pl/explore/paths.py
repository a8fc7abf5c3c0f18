"""Paths between two pictures: of feature maps, and as controls of pixels and of latents; how natural each step is."""

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from featinv_pl.explore.exploration import Samples, classified, decode, encode
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.nets.backbone import Backbone
from featinv_pl.types import Observation

Mode = Literal["linear", "slerp"]
FEATURES, PIXELS, LATENTS = "features", "pixels", "latents"
COLORS = {FEATURES: "tab:blue", PIXELS: "grey", LATENTS: "tab:orange"}
LOW, HIGH = 0.01, 0.99  # quantiles: the range of cosines between real images
AT_ONCE = 64  # images that a held-out classifier reads


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Turn the vector at each location from the first map's to the second's, and change its norm evenly.

    The spherical interpolation of Shoemake (Animating Rotation with Quaternion Curves, 1985) along the channels.
    Opposite or equal directions go straight.
    """
    one, two = first.double(), second.double()  # the angle between similar vectors loses half the digits
    norms = [vectors.norm(dim=-3, keepdim=True) for vectors in (one, two)]
    start, end = normalize(one, dim=-3), normalize(two, dim=-3)
    angle = (start * end).sum(dim=-3, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    turned = (((1 - share) * angle).sin() * start + (share * angle).sin() * end) / sine
    straight = (sine < 1e-6) | (norms[0] == 0) | (norms[1] == 0)
    lengths = torch.lerp(norms[0], norms[1], share)
    return torch.where(straight, torch.lerp(one, two, share), turned * lengths).to(first.dtype)


BETWEEN: Mapping[Mode, Callable[[Tensor, Tensor, float], Tensor]] = {"linear": torch.lerp, "slerp": slerp}


def control_paths(pipeline: FeatInvPipeline, images: Tensor, shares: list[float], mode: Mode) -> dict[str, Observation]:
    """What is seen on the ways between the pixels and between the latents of two images (2, 3, H, W).

    Pixels are mixed, and latents, those of the prior's autoencoder, go as the feature maps do. As for
    `reconstruct_maps`, with a single sample: images (S, 1, 3, H, W).
    """
    mixed = torch.stack([torch.lerp(images[0], images[1], share) for share in shares])
    ends = encode(pipeline, images)
    between = torch.stack([BETWEEN[mode](ends[0], ends[1], share) for share in shares])
    found = {PIXELS: classified(pipeline, mixed), LATENTS: classified(pipeline, decode(pipeline, between))}
    return {
        name: {"images": one["images"][:, None], "features": one["features"][:, None], "logits": one["logits"][:, None]}
        for name, one in found.items()
    }


class Naturalness:
    """How similar images are to the most similar real one, by cosine.

    Args:
        real: Real images.
        judge: A held-out classifier, whose feature vectors, averaged over locations, are compared; else the
            maps of the classifier that is inverted, whose cosine is averaged over locations.

    Attributes:
        limits: The range of that cosine among the real images themselves, from the 1 % to the 99 % quantile.
    """

    def __init__(self, real: Samples, judge: Backbone | None = None) -> None:
        self.judge = judge
        if judge is None:
            self.vectors = _flat(real.features)
        else:
            parts = range(0, len(real.keys), AT_ONCE)
            images = (real.images(range(start, min(start + AT_ONCE, len(real.keys)))) for start in parts)
            self.vectors = torch.cat([self._pooled(part) for part in images])
        among = (self.vectors @ self.vectors.T).fill_diagonal_(-torch.inf).amax(1)
        low, high = among.quantile(torch.tensor([LOW, HIGH])).tolist()
        self.limits: tuple[float, float] = (low, high)

    def __call__(self, seen: Observation) -> list[float]:
        """The cosine of each step (S), from the first sample's images (S, n, 3, H, W) or maps (S, n, C, h, w)."""
        vectors = _flat(seen["features"][:, 0]) if self.judge is None else self._pooled(seen["images"][:, 0])
        found: list[float] = (vectors @ self.vectors.T).amax(1).tolist()
        return found

    def _pooled(self, images: Tensor) -> Tensor:
        assert self.judge is not None
        read = [self.judge.classify(part.to(self.judge.mean.device)) for part in images.split(AT_ONCE)]
        vectors: Tensor = normalize(torch.cat([one["features"].mean((2, 3)).cpu() for one in read]))
        return vectors


def _flat(features: Tensor) -> Tensor:
    """Maps (B, C, h, w) as vectors (B, C h w) whose product is the cosine averaged over locations."""
    vectors: Tensor = normalize(features.float()).flatten(1)
    return vectors / sqrt(features[0, 0].numel())


def similarities(features: Tensor, others: Tensor) -> Tensor:
    """Cosines (B, n) of maps (B, C, h, w) with maps (n, C, h, w), averaged over locations."""
    return _flat(features) @ _flat(others).T
