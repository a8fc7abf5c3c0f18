"""Interpolation and composition measure what they show."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from featinv_pl.errors import UserError
from featinv_pl.explore.exploration import box_mask, location_weights, read_samples
from featinv_pl.explore.pairs import compose, interpolate, slerp
from featinv_pl.inverter.pipeline import FeatInvPipeline

Pictures = tuple[Image.Image, Image.Image]


def reconstructed(pipeline: FeatInvPipeline, picture: Image.Image, seed: int = 0) -> tuple[torch.Tensor, float]:
    """A picture's plain reconstruction, and its cosine."""
    features = pipeline.classify(pipeline.crop([picture]))["features"]
    views = pipeline.classify(pipeline.reconstruct(features[0], seed=seed))
    return views["images"][0], torch.cosine_similarity(views["features"], features).mean().item()


# Interpolation


@pytest.mark.parametrize("path", [torch.lerp, slerp])
def test_paths_begin_and_end_at_the_maps(path: Callable[..., torch.Tensor]) -> None:
    first, second = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(path(first, second, 0.0), first)
    torch.testing.assert_close(path(first, second, 1.0), second)


def test_slerp_keeps_norms_where_the_straight_line_does_not() -> None:
    first, second = torch.randn(2, 8, 4, 4)
    norms = [one.norm(dim=0) for one in (first, second)]
    middle = slerp(first, second, 0.25)
    torch.testing.assert_close(middle.norm(dim=0), 0.75 * norms[0] + 0.25 * norms[1])
    assert (torch.lerp(first, second, 0.25).norm(dim=0) < middle.norm(dim=0)).all()
    # A quarter of the way is a quarter of the angle.
    angle = torch.cosine_similarity(first, second, dim=0).acos()
    torch.testing.assert_close(torch.cosine_similarity(first, middle, dim=0).acos(), angle / 4, atol=1e-3, rtol=0)


def test_slerp_goes_straight_where_there_is_no_way_to_turn() -> None:
    one = torch.ones(3, 1, 1)
    torch.testing.assert_close(slerp(one, 3 * one, 0.5), 2 * one)
    torch.testing.assert_close(slerp(one, -one, 0.25), 0.5 * one)
    torch.testing.assert_close(slerp(torch.zeros(3, 1, 1), one, 0.5), 0.5 * one)


def test_ends_are_the_plain_reconstructions(pipeline: FeatInvPipeline, opened: Pictures) -> None:
    straight, turned = (interpolate(pipeline, *opened, steps=5, mode=mode, seed=3) for mode in ("linear", "slerp"))
    assert straight.shares == [0, 0.25, 0.5, 0.75, 1]
    assert not torch.equal(straight.found["images"][2], turned.found["images"][2])
    for step, picture, end in ((0, opened[0], 0), (-1, opened[1], 1)):
        image, cosine = reconstructed(pipeline, picture, seed=3)
        for found in (straight, turned):
            torch.testing.assert_close(found.found["images"][step, 0], image, atol=2 / 127, rtol=0)
            assert found.cosines[step, end].item() == pytest.approx(cosine, abs=1e-3)


def test_flags_what_is_further_from_all_real_images_than_they_are_from_each_other(
    pipeline: FeatInvPipeline, opened: Pictures, digit_shards: Path
) -> None:
    real = read_samples([digit_shards / "train"], 1000, "--real")
    found = interpolate(pipeline, *opened, steps=3, real=real)
    maps = real.features.float()
    cosines = torch.cosine_similarity(maps[:, None], maps[None], dim=2).mean((2, 3)) - 2 * torch.eye(len(maps))
    low, high = cosines.amax(1).quantile(torch.tensor([0.01, 0.99])).tolist()
    assert found.real == pytest.approx((low, high), abs=1e-4)
    nearest = torch.cosine_similarity(found.found["features"], maps[None], dim=2).mean((2, 3)).amax(1)
    assert found.nearest == pytest.approx(nearest.tolist(), abs=1e-4)
    assert found.flags == [cosine < low for cosine in nearest.tolist()]
    # Real images all alike, among which nothing else belongs.
    alike = replace(real, features=torch.cat([maps[:1]] * 5).half())
    assert interpolate(pipeline, *opened, steps=3, real=alike).flags == [True] * 3
    for limits, flagged in (((-1.0, 1.0), False), (None, False), ((1.0, 1.0), True)):
        [_, steps, *_] = replace(found, real=limits).sections()
        assert [tile.flagged for tile in steps.rows[0]] == [flagged] * 3


def test_refuses_real_images_of_another_backbone(
    pipeline: FeatInvPipeline, opened: Pictures, digit_shards: Path
) -> None:
    real = read_samples([digit_shards / "train"], 5, "--real")
    other = replace(real, origin={**real.origin, "layer": "layer3"})
    with pytest.raises(UserError, match=r"`real` belongs to .* layer layer3"):
        interpolate(pipeline, *opened, real=other)


# Composition


def test_a_box_becomes_shares_of_locations() -> None:
    mask = box_mask((0, 8, 12, 24), (32, 32))
    assert mask.sum() == 12 * 24
    expected = torch.tensor([1.0, 0.5, 0, 0])[:, None] * torch.tensor([0.0, 1, 1, 1])
    torch.testing.assert_close(location_weights(mask, torch.empty(8, 4, 4)), expected)


@pytest.mark.parametrize(
    "box", [(0, 0, 33, 8), (-1, 0, 8, 8), (28, 0, 8, 8), (0, 25, 8, 8), (0, 0, 0, 8), (0, 0, 8, -2)]
)
def test_refuses_a_box_outside_the_image(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match=r"`box`: .* is not within the classifier's crop of 32x32 pixels"):
        box_mask(box, (32, 32))


def test_a_region_of_one_map_lies_in_the_other(pipeline: FeatInvPipeline, opened: Pictures) -> None:
    found = compose(pipeline, *opened, box=(0, 0, 32, 16), num_samples=2, seed=4)
    ours, theirs = pipeline.classify(pipeline.crop(opened))["features"]
    composed = torch.cat([theirs[..., :2], ours[..., 2:]], dim=-1)
    views = pipeline.classify(pipeline.reconstruct(composed, 2, seed=4))
    assert torch.equal(found.found["images"][0], views["images"])
    inside, outside = found.means["inside"], found.means["outside"]
    for number, wanted in enumerate((composed, ours, theirs)):
        cosines = torch.cosine_similarity(views["features"], wanted[None])
        torch.testing.assert_close(inside[:, number], cosines[..., :2].mean((1, 2)))
        torch.testing.assert_close(outside[:, number], cosines[..., 2:].mean((1, 2)))
    torch.testing.assert_close(inside[:, 0], inside[:, 2])  # what was pasted is the second's
    torch.testing.assert_close(outside[:, 0], outside[:, 1])


def test_a_region_of_everything_leaves_nothing_outside(pipeline: FeatInvPipeline, opened: Pictures) -> None:
    found = compose(pipeline, *opened, box=(0, 0, 32, 32))
    # But for a grey level: sums are ordered differently in batches of other sizes.
    image, _ = reconstructed(pipeline, opened[1])
    torch.testing.assert_close(found.found["images"][0, 0], image, atol=2.01 / 255, rtol=0)
    assert found.facts()["images"][0]["outside"] == {"composed": None, "first": None, "second": None}
    found.save(Path("out"))
