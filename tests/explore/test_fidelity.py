"""What reconstructions keep of a map at each place, and what it leaves open."""

import torch
from PIL import Image

from featinv_pl.explore.fidelity import Fidelity
from featinv_pl.types import Observation


def samples(images: torch.Tensor, features: torch.Tensor) -> Observation:
    return {"images": images, "features": features, "logits": torch.zeros(len(images), 10)}


def test_cosines_and_spread_are_those_of_each_place() -> None:
    target = torch.ones(2, 1, 3)
    features = torch.ones(2, 2, 1, 3)
    features[:, :, 0, 1] = -1  # the opposite, in both samples
    features[0, 0, 0, 2] = -1  # at a right angle, in one of two
    images = torch.zeros(2, 3, 4, 4)
    images[0, :, 1, 2] = 0.5  # pixels in [0, 1] differ by a quarter
    found = Fidelity.measure(target, samples(images, features))
    torch.testing.assert_close(found.cosines, torch.tensor([[1.0, -1.0, 0.5]]))
    assert found.spread is not None
    expected = torch.zeros(4, 4)
    expected[1, 2] = 0.25 / 2**0.5
    torch.testing.assert_close(found.spread, expected)
    assert found.facts["cosine_by_location"] == [[1.0, -1.0, 0.5]]

    picture = Image.new("RGB", (8, 8), "black")
    (lost, _, words), (spread, _, _) = found.tiles(picture)
    assert words == "cosine -1.000 to 1.000"
    assert sum(lost.getpixel((4, 4))) > sum(lost.getpixel((0, 4)))  # type: ignore[arg-type]
    assert sum(spread.getpixel((5, 3))) > sum(spread.getpixel((0, 0)))  # type: ignore[arg-type]


def test_one_sample_has_no_spread() -> None:
    found = Fidelity.measure(torch.ones(2, 1, 1), samples(torch.zeros(1, 3, 4, 4), torch.ones(1, 2, 1, 1)))
    assert found.spread is None
    assert len(found.tiles(Image.new("RGB", (8, 8)))) == 1
    assert "pixel_spread" not in found.facts
