"""Interpolation, composition and comparison measure what they draw."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from featinv_pl.errors import UserError
from featinv_pl.explore.comparison import compare
from featinv_pl.explore.composition import compose
from featinv_pl.explore.interpolation import interpolate
from featinv_pl.explore.samples import Origin, Samples, read_samples
from featinv_pl.inverter.pipeline import FeatInvPipeline

Pictures = tuple[Image.Image, Image.Image]


def reconstructed(pipeline: FeatInvPipeline, picture: Image.Image, seed: int = 0) -> tuple[torch.Tensor, float]:
    """A picture's plain reconstruction, and its cosine."""
    features = pipeline.classify(pipeline.crop([picture]))["features"]
    views = pipeline.classify(pipeline.reconstruct(features[0], seed=seed))
    return views["images"][0], torch.cosine_similarity(views["features"], features).mean().item()


# Interpolation


@pytest.mark.parametrize("mode", ["linear", "slerp"])
def test_ends_are_the_plain_reconstructions(mode: str, pipeline: FeatInvPipeline, opened: Pictures) -> None:
    found = interpolate(pipeline, *opened, steps=5, mode=mode, seed=3)  # type: ignore[arg-type]
    assert found.shares == [0, 0.25, 0.5, 0.75, 1]
    for step, picture, end in ((0, opened[0], 0), (-1, opened[1], 1)):
        image, cosine = reconstructed(pipeline, picture, seed=3)
        torch.testing.assert_close(found.images[step], image, atol=2 / 127, rtol=0)
        assert found.cosines[step, end].item() == pytest.approx(cosine, abs=1e-3)


def test_modes_differ_in_between(pipeline: FeatInvPipeline, opened: Pictures) -> None:
    straight, turned = (interpolate(pipeline, *opened, steps=3, mode=mode) for mode in ("linear", "slerp"))
    assert not torch.equal(straight.images[1], turned.images[1])


def real_images(features: torch.Tensor) -> Samples:
    origin = Origin(backbone="", backbone_digest="", layer="", feature_shape=[])
    size = len(features)
    return Samples(features.half(), torch.zeros(size), [""] * size, origin, [], [0] * size, list(range(size)))


def test_flags_what_is_further_from_all_real_images_than_they_are_from_each_other(
    pipeline: FeatInvPipeline, opened: Pictures, digit_shards: Path
) -> None:
    real = read_samples([digit_shards / "train"], 1000, "--real")
    found = interpolate(pipeline, *opened, steps=3, real=real)
    maps = real.features.float()
    cosines = torch.cosine_similarity(maps[:, None], maps[None], dim=2).mean((2, 3)) - 2 * torch.eye(len(maps))
    low, high = cosines.amax(1).quantile(torch.tensor([0.01, 0.99])).tolist()
    assert found.real == pytest.approx((low, high), abs=1e-4)
    drawn = pipeline.classify(found.images)["features"]
    nearest = torch.cosine_similarity(drawn[:, None], maps[None], dim=2).mean((2, 3)).amax(1)
    assert found.nearest == pytest.approx(nearest.tolist(), abs=1e-4)
    assert found.flags == [cosine < low for cosine in nearest.tolist()]
    # Real images all alike, among which nothing else belongs; and such as differ from each other in every way.
    alike = replace(real, features=torch.cat([maps[:1]] * 5).half())
    assert interpolate(pipeline, *opened, steps=3, real=alike).flags == [True] * 3
    assert replace(found, real=(-1.0, 1.0)).flags == [False] * 3
    assert replace(found, real=None).flags == [False] * 3
    [_, drawn_section, *_] = replace(found, real=(1.0, 1.0)).sections()
    assert all(tile.flagged for tile in drawn_section.rows[0])


def test_refuses_real_images_of_another_backbone(
    pipeline: FeatInvPipeline, opened: Pictures, digit_shards: Path
) -> None:
    real = read_samples([digit_shards / "train"], 5, "--real")
    other = replace(real, origin={**real.origin, "layer": "layer3"})
    with pytest.raises(UserError, match=r"`real` belongs to .* layer layer3"):
        interpolate(pipeline, *opened, real=other)


# Composition


def test_a_region_of_one_map_lies_in_the_other(pipeline: FeatInvPipeline, opened: Pictures) -> None:
    found = compose(pipeline, *opened, box=(0, 0, 32, 16), num_samples=2, seed=4)
    ours, theirs = pipeline.classify(pipeline.crop(opened))["features"]
    composed = torch.cat([theirs[..., :2], ours[..., 2:]], dim=-1)
    views = pipeline.classify(pipeline.reconstruct(composed, 2, seed=4))
    assert torch.equal(found.images, views["images"])
    for number, wanted in enumerate((composed, ours, theirs)):
        cosines = torch.cosine_similarity(views["features"], wanted[None])
        torch.testing.assert_close(found.inside[:, number], cosines[..., :2].mean((1, 2)))
        torch.testing.assert_close(found.outside[:, number], cosines[..., 2:].mean((1, 2)))
    torch.testing.assert_close(found.inside[:, 0], found.inside[:, 2])  # what was pasted is the second's
    torch.testing.assert_close(found.outside[:, 0], found.outside[:, 1])


def test_a_region_of_everything_leaves_nothing_outside(pipeline: FeatInvPipeline, opened: Pictures) -> None:
    found = compose(pipeline, *opened, box=(0, 0, 32, 32))
    # But for a grey level: sums are ordered differently in batches of other sizes.
    torch.testing.assert_close(found.images[0], reconstructed(pipeline, opened[1])[0], atol=2.01 / 255, rtol=0)
    assert found.facts()["images"][0]["outside"] == {"composed": None, "first": None, "second": None}
    found.save(Path("out"))


# Comparison


def test_each_model_draws_each_picture(pipeline: FeatInvPipeline, opened: Pictures) -> None:
    found = compare([("one", pipeline), ("two", pipeline)], ["a", "b"], opened, seed=2)
    for number, picture in enumerate(opened):
        image, cosine = reconstructed(pipeline, picture, seed=2)
        for drawn in found.models:
            torch.testing.assert_close(drawn.images[number], image, atol=2 / 127, rtol=0)
            assert drawn.cosines[number].item() == pytest.approx(cosine, abs=1e-3)
    facts = found.facts()
    assert list(facts) == ["a", "b"]
    assert len(facts["a"]["one"]["before"]) == len(facts["a"]["two"]["after"]) == 5
    probabilities = pipeline.classify(pipeline.crop(opened))["logits"][1].softmax(0)
    first, share = next(iter(facts["b"]["one"]["before"].items()))
    assert (first, share) == (str(int(probabilities.argmax())), pytest.approx(probabilities.max().item(), abs=1e-4))
