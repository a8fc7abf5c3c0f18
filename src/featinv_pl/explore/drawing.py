"""Drawing many maps from the same noise, and looking at what was drawn."""

from collections.abc import Iterable

import torch
from torch import Tensor

from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.types import Observation


def reconstruct_all(
    pipeline: FeatInvPipeline, maps: Iterable[Tensor], num_samples: int = 1, seed: int = 0
) -> Observation:
    """Draw images from several maps, each from the same noise, and send them through the classifier as bytes.

    Args:
        pipeline: The inverter.
        maps: S maps (C, h, w).
        num_samples: n images of each.
        seed: Of the noise.

    Returns:
        On the CPU: images (S, n, 3, H, W) in [-1, 1], features (S, n, C, h, w), logits (S, n, K).
    """
    observations = [pipeline.classify(pipeline.reconstruct(one, num_samples, seed)) for one in maps]
    return {
        "images": torch.stack([one["images"] for one in observations]).cpu(),
        "features": torch.stack([one["features"] for one in observations]).cpu(),
        "logits": torch.stack([one["logits"] for one in observations]).cpu(),
    }
