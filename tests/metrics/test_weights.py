"""Published networks: nothing else may give a score its name."""

import hashlib
import shutil
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from jsonargparse import ArgumentParser
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from conftest import random_inception
from featinv_pl.errors import UserError
from featinv_pl.metrics import weights
from featinv_pl.metrics.weights import ALEXNET, INCEPTION, Inception, Lpips, Weights, find


def published(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give a file a name that vouches for it, and publish it there."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    url = path.rename(path.with_name(f"published-{digest}.pth")).absolute().as_uri()
    monkeypatch.setattr(weights, name, url)
    return url


def test_the_word_in_a_configuration_is_no_path() -> None:
    parser = ArgumentParser()
    parser.add_argument("--weights", type=Weights)
    given = [parser.parse_args([f"--weights={word}"]).weights for word in ("download", "mine.pth", "null")]
    assert given == ["download", Path("mine.pth"), None]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "'{kept.name}' has not been downloaded yet. Set --x to `download`"),
        ("download", "--x: the download failed (<urlopen error no network>)"),
        (Path("mine.pth"), "there is no file 'mine.pth'"),
        (Path(__file__), "is not the published file: its SHA-256 starts with"),
    ],
)
def test_without_weights_an_error_says_how_to_get_them(
    given: Weights, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def urlopen(url: str, timeout: float) -> None:
        assert timeout <= 10
        raise URLError("no network")

    monkeypatch.setattr(weights, "urlopen", urlopen)
    for url, network in {INCEPTION: Inception, ALEXNET: Lpips}.items():
        kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        with pytest.raises(UserError) as error:
            network(given, "--x")
        assert said.format(kept=kept) in str(error.value)
        assert f"Download {url} and save it as '{kept}', or set --x to its path" in str(error.value)
        assert not kept.exists()


def test_a_download_is_checked_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("good").write_bytes(b"weights")
    url = published(Path("good"), "INCEPTION", monkeypatch)
    path = find(url, "download", "--x")
    Path(path.name).unlink()
    assert find(url, "download", "--x") == find(url, None, "--x") == path
    assert path.read_bytes() == b"weights"
    Path("bad-00000000.pth").write_bytes(b"weights")
    with pytest.raises(UserError, match="--x: the download failed"):
        find(Path("bad-00000000.pth").absolute().as_uri(), "download", "--x")
    assert list(path.parent.iterdir()) == [path]


def test_perceptual_distance_is_that_of_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, *_, **__: tensor)  # a second for each network
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in torchvision.models.alexnet().state_dict().items()}
    unused = torch.zeros(())  # the matrices of its head, which are large
    small = {name: unused.expand(one) if len(one) == 2 else torch.randn(one) / 20 for name, one in shapes.items()}
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(ALEXNET).name  # where torchmetrics does not check it
    kept.parent.mkdir(parents=True)
    torch.save(small, kept)
    images = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    theirs = [LearnedPerceptualImagePatchSimilarity("alex")(*pair.unsqueeze(1)).item() for pair in images.unbind(1)]
    assert min(theirs) > 0.001
    url = published(Path(shutil.move(kept, "mine.pth")), "ALEXNET", monkeypatch)
    assert Lpips(Path(Path(url).name), "--x")(*images).tolist() == pytest.approx(theirs, rel=1e-5)


def test_features_are_those_that_torchmetrics_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights under a name that vouches for them: the rest of the way is that of FID."""
    path = random_inception(Path("random.pth"), monkeypatch)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    theirs: Any = FrechetInceptionDistance(feature_extractor_weights_path=str(path), antialias=False)
    features = Inception(path, "--x")(images / 127.5 - 1)
    assert features.shape == (2, weights.INCEPTION_FEATURES)
    assert features.std() > 0
    torch.testing.assert_close(features, theirs.inception(images.to(torch.uint8)))
