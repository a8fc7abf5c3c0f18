"""Networks whose published weights define some scores: FID's Inception, and LPIPS' AlexNet."""

import hashlib
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, cast
from urllib.request import urlopen

import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips
from torchmetrics.image.fid import NoTrainInceptionV3

from featinv_pl.errors import UserError
from featinv_pl.types import to_uint8

INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
INCEPTION_FEATURES = 2048
PATIENCE = 10  # seconds to wait for a server's answer

# `download` to fetch it once, a file, or None for the file that torch has downloaded before, if any.
# The literal comes first: jsonargparse tries one after the other, and any string can be a path.
Weights = Literal["download"] | Path | None


class Inception(nn.Module):
    """The Inception network of 2015 that defines FID and KID, as torch-fidelity ports it; for arguments see `find`.

    Images are resized to 299 pixels as TensorFlow 1 did, without antialiasing, as in the original FID.
    """

    def __init__(self, weights: Weights, option: str) -> None:
        super().__init__()
        path = find(INCEPTION, weights, option)
        self.network = NoTrainInceptionV3(
            "inception-v3-compat", [str(INCEPTION_FEATURES)], feature_extractor_weights_path=str(path), antialias=False
        ).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of images (B, 3, H, W) in [-1, 1]."""
        return cast(Tensor, self.network(to_uint8(images)))


class Lpips(nn.Module):
    """LPIPS with AlexNet (Zhang et al., arXiv 1801.03924): a distance between images; for arguments see `find`.

    The weights that LPIPS adds to AlexNet's come with torchmetrics.
    """

    def __init__(self, weights: Weights, option: str) -> None:
        super().__init__()
        alexnet = torch.load(find(ALEXNET, weights, option), map_location="cpu", weights_only=True)
        self.network: Any = _NoTrainLpips(net="alex", pnet_rand=True)
        # `slice2.3.weight` of the network is `features.3.weight` of the file.
        ours = self.network.net.state_dict()
        self.network.net.load_state_dict({name: alexnet[f"features.{name.partition('.')[2]}"] for name in ours})

    @torch.no_grad()
    def forward(self, preds: Tensor, target: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, H, W) in [-1, 1]."""
        return cast(Tensor, self.network(preds, target)).reshape(-1)


def find(url: str, weights: Weights, option: str) -> Path:
    """The file of weights that are published at a URL, checked by the beginning of its SHA-256 in its name.

    Errors call `weights` by `option`.
    """
    kept, published = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name, Path(url).stem.rpartition("-")[2]
    shown = Path("~", kept.relative_to(Path.home())) if kept.is_relative_to(Path.home()) else kept
    by_hand = f"Download {url} and save it as '{shown}', or set {option} to its path."
    if weights == "download" and not kept.is_file():
        try:
            urlopen(url, timeout=PATIENCE).close()  # torch's download would wait for minutes
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(kept), hash_prefix=published)
        except (OSError, HTTPException, RuntimeError) as error:
            raise UserError(f"{option}: the download failed ({error}). {by_hand}") from error
    path = weights if isinstance(weights, Path) else kept
    if not path.is_file():  # a model card may quote this, so it does not say where the home is
        missing = f"there is no file '{path}'" if path == weights else f"'{kept.name}' has not been downloaded yet"
        raise UserError(f"{missing}. Set {option} to `download`. Without a network: {by_hand}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(published):
        reason = f"its SHA-256 starts with {digest[:8]} instead of {published}"
        raise UserError(f"{option}: '{path}' is not the published file: {reason}. {by_hand}")
    return path
