"""How alike two feature maps or images are, and how much reconstructions from one map differ."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from featinv_pl.metrics.sample_metric import SampleMetric

BINS, QUANTILE = 4000, 0.05
WINDOW = 11  # pixels of a side of SSIM's Gaussian window


class MapSimilarity(SampleMetric):
    """Cosine similarity between feature maps (B, C, h, w), in the variants that the literature leaves open.

    `cosine` is the mean over locations, `cosine_median` the median over locations, `cosine_flat` that
    of the flattened maps, `cosine_pooled` that of the spatial means; each is averaged over samples.
    `cosine_q05` is the 5 % quantile over samples of the mean over locations, read off a histogram of
    4,000 bins, so that memory is constant: it is exact to 0.0005, and has no replicates.
    """

    names = ("cosine", "cosine_median", "cosine_flat", "cosine_pooled")
    reads = ("features", "features")
    histogram: Tensor

    def __init__(self, replicates: int = 0) -> None:
        super().__init__(replicates)
        self.add_state("histogram", torch.zeros(BINS, dtype=torch.long), dist_reduce_fx="sum")

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        preds, target = preds.double(), target.double()
        local = cosine_similarity(preds, target, dim=1).flatten(1)
        flat = cosine_similarity(preds.flatten(1), target.flatten(1))
        pooled = cosine_similarity(preds.mean((2, 3)), target.mean((2, 3)))
        return torch.stack([local.mean(1), local.quantile(0.5, dim=1), flat, pooled], dim=1)

    def update(self, preds: Tensor, target: Tensor, *names: Any) -> None:
        super().update(preds, target, *names)
        bins = ((self.latest[:, 0] + 1) / 2 * BINS).long().clamp(0, BINS - 1)
        self.histogram += torch.bincount(bins, minlength=BINS)

    def compute(self) -> dict[str, Tensor]:
        below = self.histogram.cumsum(0) < QUANTILE * self.histogram.sum()
        quantile = (below.sum() + 0.5) / BINS * 2 - 1
        return {**super().compute(), "cosine_q05": quantile.where(self.histogram.any(), torch.nan)}


class PixelSimilarity(SampleMetric):
    """Similarity of images (B, 3, H, W) in [-1, 1].

    `psnr` is the peak signal-to-noise ratio in dB, at most 100, which stands for equal images; `ssim` the
    structural similarity of luminance (Wang et al., 2004), averaged, as there, over the locations whose window
    of 11 pixels lies within the image.
    """

    names = ("psnr", "ssim")
    reads = ("images", "images")

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        preds, target = (preds + 1) / 2, (target + 1) / 2
        error = (preds.double() - target).square().flatten(1).mean(1)
        psnr = -10 * error.clamp(min=1e-10).log10()
        luminance = preds.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        grey, reference = ((images * luminance).sum(1, keepdim=True) for images in (preds, target))
        _, local = structural_similarity_index_measure(
            grey, reference, kernel_size=WINDOW, data_range=1.0, reduction="none", return_full_image=True
        )
        # At the border torchmetrics pads the image with its reflection.
        inside = local[..., WINDOW // 2 : -(WINDOW // 2), WINDOW // 2 : -(WINDOW // 2)]
        return torch.stack([psnr, inside.flatten(1).double().mean(1)], dim=1)


class PerceptualDistance(SampleMetric):
    """`lpips` (Zhang et al., arXiv 1801.03924): a distance between activations of AlexNet, as `Lpips` computes it."""

    names = ("lpips",)
    reads = ("images", "images")

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor], replicates: int = 0) -> None:
        super().__init__(replicates)
        self.distance = distance

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        return self.distance(preds, target).double().unsqueeze(1)


class Diversity(SampleMetric):
    """Differences of the samples of a map, over all pairs; the original does not matter.

    `diversity_pixels` is the root mean square difference of pixels in [0, 1] of images (B, n, 3, H, W) in [-1, 1],
    `diversity_maps` 1 - cosine, mean over locations, of their maps (B, n, C, h, w).
    """

    names = ("diversity_pixels", "diversity_maps")
    reads = (("sample_images", "sample_features"), "images")

    def score(self, preds: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        images, maps = (combinations(samples.double().unbind(1), 2) for samples in preds)
        pixels = [((one - other) / 2).square().flatten(1).mean(1).sqrt() for one, other in images]
        cosines = [cosine_similarity(one, other).flatten(1).mean(1) for one, other in maps]
        return torch.stack([torch.stack(pixels).mean(0), 1 - torch.stack(cosines).mean(0)], dim=1)
