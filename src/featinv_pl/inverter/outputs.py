"""What a pipeline returns."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from featinv_pl.types import to_uint8

OutputType = Literal["pil", "pt", "np"]
Images = list[Image.Image] | Tensor | NDArray[np.float32]


@dataclass
class FeatInvOutput(BaseOutput):  # type: ignore[misc]
    """N reconstructions, all samples of the first picture or map first; tensors are on the CPU.

    Attributes:
        images: PIL images, or in [0, 1] a tensor (N, 3, H, W) or an array (N, H, W, 3).
        maps: (N, C, h, w), the feature maps that the classifier computes of the images.
        logits: (N, K), those of the images; K is 0 for a network without classes.
        cosine: (N,), of these maps with those that were given, averaged over locations.
    """

    images: Images
    maps: Tensor
    logits: Tensor
    cosine: Tensor


def converted(images: Tensor, output_type: OutputType) -> Images:
    """Images (N, 3, H, W) in [-1, 1] as they were asked for."""
    if output_type == "pil":
        return [as_picture(image) for image in images]
    images = ((images + 1) / 2).clamp(0, 1).cpu()
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()


def as_picture(image: Tensor) -> Image.Image:
    """Convert an image (3, H, W) in [-1, 1] to a picture."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
