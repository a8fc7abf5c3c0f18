"""Interpolation: the maps between those of two pictures, reconstructed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from featinv_pl.explore.edits import lerp, refuse_overflow, slerp
from featinv_pl.explore.reconstruct import reconstruct_maps, tile
from featinv_pl.explore.samples import Samples, refuse_other_backbone
from featinv_pl.inverter.pipeline import FeatInvPipeline, as_picture
from featinv_pl.pages.page import RED, Report, Section, Tile, plot_probabilities
from featinv_pl.pages.pictures import prediction

Mode = Literal["linear", "slerp"]
PATHS: dict[Mode, Callable[[Tensor, Tensor, float], Tensor]] = {"linear": lerp, "slerp": slerp}
LOW, HIGH = 0.01, 0.99  # quantiles: the range of cosines between real images


@dataclass(frozen=True)
class Interpolation(Report):
    """Reconstructions of the maps between those of two pictures.

    Attributes:
        mode: The path.
        shares: (S) of the second map, from 0 to 1.
        originals: (2, 3, H, W), the two pictures.
        original_logits: (2, K).
        images: (S, 3, H, W) in [-1, 1], as bytes would hold them.
        logits: (S, K), measured on the images, as are the next.
        cosines: (S, 2) with the maps of the two pictures.
        nearest: (S) with the map of the most similar real image, if real images were given.
        real: The range of that cosine among the real images themselves.
    """

    name: ClassVar[str] = "interpolation"

    mode: Mode
    shares: list[float]
    originals: Tensor
    original_logits: Tensor
    images: Tensor
    logits: Tensor
    cosines: Tensor
    nearest: list[float] | None
    real: tuple[float, float] | None

    @property
    def flags(self) -> list[bool]:
        """For each step whether it is further from every real image than these are from each other."""
        if self.nearest is None or self.real is None:
            return [False] * len(self.shares)
        return [cosine < self.real[0] for cosine in self.nearest]

    @property
    def title(self) -> str:
        return "Interpolation"

    @property
    def lead(self) -> str:
        first, second = (prediction(logits) for logits in self.original_logits)
        text = (
            f"From the feature map of a picture of class {first} to that of one of class {second} in "
            f"{len(self.shares)} steps ({self.mode}), each reconstructed from the same noise. Cosines and classes are "
            "measured on the reconstructions."
        )
        if self.real is None:
            return f"{text} No step is flagged, for lack of real images to compare with (--real)."
        return (
            f"{text} The real images' cosines to the most similar other one lie between {self.real[0]:.3f} and "
            f"{self.real[1]:.3f} (98 %); {sum(self.flags)} steps lie below, in red."
        )

    def sections(self) -> list[Section]:
        ends = [tile(*end) for end in zip(self.originals, self.original_logits, ("first", "second"), strict=True)]
        steps = [
            Tile(as_picture(image), f"{share:.2f}\ncosine {first:.2f}, {second:.2f}\nclass {prediction(logits)}", flag)
            for share, image, (first, second), logits, flag in zip(
                self.shares, self.images, self.cosines.tolist(), self.logits, self.flags, strict=True
            )
        ]
        text = "Below each image the share of the second map, the cosines with both, and the predicted class."
        return [
            Section("The two pictures", rows=[ends]),
            Section("Reconstructions", text, [steps]),
            Section("Cosines with the feature maps", plot=self._plot_cosines),
            Section("Probabilities of the pictures' classes", plot=self._plot_classes),
        ]

    def _plot_cosines(self, axes: Axes) -> None:
        for name, cosines in zip(("first", "second"), self.cosines.T, strict=True):
            axes.plot(self.shares, cosines.numpy(), marker=".", label=name)
        if self.nearest is not None and self.real is not None:
            axes.plot(self.shares, self.nearest, marker=".", color="grey", label="most similar real image")
            axes.axhspan(*self.real, color="grey", alpha=0.2, linewidth=0, label="among real images")
            flagged = [step for step, flag in enumerate(self.flags) if flag]
            axes.plot(self.shares, self.nearest, "o", markevery=flagged, color=RED)
        axes.set(xlabel="share of the second map", ylabel="cosine")
        axes.legend(fontsize="small")

    def _plot_classes(self, axes: Axes) -> None:
        probabilities = self.logits.float().softmax(1)
        ends = self.original_logits if self.logits.shape[1] else ()
        lines = {prediction(logits): probabilities[:, logits.argmax()] for logits in ends}
        plot_probabilities(axes, self.shares, lines, "share of the second map")

    def facts(self) -> dict[str, Any]:
        nearest: Sequence[float | None] = self.nearest or [None] * len(self.shares)
        return {
            "mode": self.mode,
            "predictions": [prediction(logits) for logits in self.original_logits],
            "real": self.real,
            "steps": [
                {
                    "share": share,
                    "cosines": self.cosines[step].tolist(),
                    "nearest": nearest[step],
                    "flagged": self.flags[step] if self.real else None,
                    "prediction": prediction(self.logits[step]),
                }
                for step, share in enumerate(self.shares)
            ],
        }


def interpolate(
    pipeline: FeatInvPipeline,
    first: Image.Image,
    second: Image.Image,
    steps: int = 11,
    mode: Mode = "linear",
    real: Samples | None = None,
    seed: int = 0,
) -> Interpolation:
    """Reconstruct `steps` maps between those of two pictures, ends included, all from the same noise.

    `slerp` keeps norms. The cosines of `real` images with each other say how far apart such images are.

    Raises:
        UserError: The real images' maps are of another backbone.
    """
    if real is not None:
        refuse_other_backbone(real.origin, pipeline, "`real`")
    ends = pipeline.classify(pipeline.crop([first, second]))
    shares = torch.linspace(0, 1, steps).tolist()
    first_map, second_map = ends["features"]
    maps = torch.stack([PATHS[mode](first_map, second_map, share) for share in shares])
    refuse_overflow(maps, "interpolate")
    found = reconstruct_maps(pipeline, maps, seed=seed)
    features = found["features"][:, 0]
    return Interpolation(
        mode,
        shares,
        ends["images"].cpu(),
        ends["logits"].cpu(),
        found["images"][:, 0],
        found["logits"][:, 0],
        _similarities(features, ends["features"].cpu()),
        None if real is None else _similarities(features, real.features).amax(1).tolist(),
        None if real is None else _range(real.features),
    )


def _similarities(features: Tensor, others: Tensor) -> Tensor:
    """Cosines (B, n) of maps (B, C, h, w) with maps (n, C, h, w), averaged over locations."""
    one, two = (normalize(maps.float()).flatten(1) for maps in (features, others))
    return one @ two.T / features[0, 0].numel()


def _range(real: Tensor) -> tuple[float, float]:
    """Where the cosines of real images with the most similar other one lie."""
    nearest = _similarities(real, real).fill_diagonal_(-torch.inf).amax(1)
    low, high = nearest.quantile(torch.tensor([LOW, HIGH])).tolist()
    return low, high
