"""Networks whose published weights some scores are defined by: FID's Inception, and LPIPS' AlexNet."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from featinv_pl.errors import UserError
from featinv_pl.types import to_uint8

INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
INCEPTION_FEATURES = 2048


class Inception(nn.Module):
    """The Inception network of 2015 by which FID and KID are defined, as torch-fidelity ports it.

    Images are resized to 299 pixels as TensorFlow 1 did, without antialiasing, as in the original FID.

    Args:
        weights: The file, `download` to fetch it once, or None to use it where torch keeps downloads.
    """

    def __init__(self, weights: Path | Literal["download"] | None) -> None:
        super().__init__()
        path = weights if isinstance(weights, Path) else cached(INCEPTION)
        if weights == "download":
            _download(INCEPTION, path)
        check(path, INCEPTION)
        self.network = NoTrainInceptionV3(
            "inception-v3-compat", [str(INCEPTION_FEATURES)], feature_extractor_weights_path=str(path), antialias=False
        ).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of images (B, 3, H, W) in [-1, 1]."""
        features: Tensor = self.network(to_uint8(images))
        return features


def perceptual_distance(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with AlexNet: from two batches of images (B, 3, H, W) in [-1, 1] to distances (B,).

    Raises:
        UserError: The weights are not where torch keeps downloads.
    """
    check(cached(ALEXNET), ALEXNET)
    network: Any = LearnedPerceptualImagePatchSimilarity("alex").net.to(device)

    def distance(preds: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, network(preds, target)).reshape(-1)

    return distance


def cached(url: str) -> Path:
    """Where torch keeps a downloaded file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def check(path: Path, url: str) -> None:
    """Refuse weights that are not the published ones, by the beginning of their SHA-256 in the published name."""
    if not path.is_file():
        raise UserError(f"there is no file '{path}'. It is published as {url}")
    expected = _digest_start(url)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected):
        raise UserError(
            f"'{path}' is not what is published as {url}: its SHA-256 starts with {digest[:8]} instead of {expected}."
        )


def _download(url: str, path: Path) -> None:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_digest_start(url))
        except (URLError, RuntimeError, OSError) as error:
            raise UserError(f"{url} could not be downloaded ({error}).") from error


def _digest_start(url: str) -> str:
    return Path(url).stem.rpartition("-")[2]
