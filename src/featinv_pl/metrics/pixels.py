"""How alike two images are."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from featinv_pl.metrics.sample_metric import SampleMetric

WINDOW = 11  # pixels of a side of SSIM's Gaussian window


class PixelSimilarity(SampleMetric):
    """Similarity of pixels.

    `psnr` is the peak signal-to-noise ratio in dB, at most 100, which stands for equal images; `ssim` the
    structural similarity of luminance (Wang et al., 2004), averaged, as there, over the locations whose window
    of 11 pixels lies within the image.
    """

    names = ("psnr", "ssim")
    reads = ("images", "images")

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        """Compare images (B, 3, H, W) in [-1, 1]."""
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
    """LPIPS (Zhang et al., arXiv 1801.03924): `lpips`, a distance between activations of AlexNet.

    Args:
        distance: From two batches of images (B, 3, H, W) in [-1, 1] to distances (B,).
        replicates: See `SampleMetric`.
    """

    names = ("lpips",)
    reads = ("images", "images")

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor], replicates: int = 0) -> None:
        super().__init__(replicates)
        self.distance = distance

    def score(self, preds: Tensor, target: Tensor) -> Tensor:
        """Compare images (B, 3, H, W) in [-1, 1]."""
        return self.distance(preds, target).double().unsqueeze(1)
