"""Published networks: nothing else may give a score its name."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from conftest import random_inception
from featinv_pl.errors import UserError
from featinv_pl.metrics import weights
from featinv_pl.metrics.weights import Inception, cached, check, perceptual_distance


def test_missing_weights_say_where_they_are_published() -> None:
    with pytest.raises(UserError, match=r"no file .*6726825d\.pth'\. It is published as https://"):
        Inception(None)
    with pytest.raises(UserError, match=r"no file 'mine\.pth'"):
        Inception(Path("mine.pth"))
    with pytest.raises(UserError, match="alexnet"):
        perceptual_distance(torch.device("cpu"))


def test_other_weights_are_refused() -> None:
    Path("mine.pth").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"SHA-256 starts with [0-9a-f]{8} instead of 6726825d"):
        Inception(Path("mine.pth"))


def test_a_download_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "INCEPTION", "file:///nowhere/weights-00000000.pth")
    with pytest.raises(UserError, match="could not be downloaded"):
        Inception("download")
    assert not cached(weights.INCEPTION).exists()


def test_a_download_is_checked_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"weights"
    for name, good in ((hashlib.sha256(data).hexdigest()[:8], True), ("00000000", False)):
        source = Path(f"weights-{name}.pth").absolute()
        source.write_bytes(data)
        url = source.as_uri()
        if good:
            weights._download(url, cached(url))
            check(cached(url), url)
        else:
            with pytest.raises(UserError, match="could not be downloaded"):
                weights._download(url, cached(url))
            assert not cached(url).exists()


def test_features_are_those_that_torchmetrics_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights under a name that vouches for them: the rest of the way is that of FID."""
    path = random_inception(Path("random.pth"), monkeypatch)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    theirs: Any = FrechetInceptionDistance(feature_extractor_weights_path=str(path), antialias=False)
    features = Inception(path)(images / 127.5 - 1)
    assert features.shape == (2, weights.INCEPTION_FEATURES)
    assert features.std() > 0
    torch.testing.assert_close(features, theirs.inception(images.to(torch.uint8)))
