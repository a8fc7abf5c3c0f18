"""Edits of maps do what they say, where they say."""

import pytest
import torch

from featinv_pl.errors import UserError
from featinv_pl.explore.edits import add, box_mask, lerp, location_weights, paste, refuse_overflow, scale, slerp

EVERYWHERE = torch.ones(4, 4)
LEFT = torch.zeros(4, 4)
LEFT[:, :2] = 1


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 8, 4, 4)


def test_a_direction_is_added_where_the_weight_is(features: torch.Tensor) -> None:
    direction = torch.randn(8, 1, 1)
    edited = add(features, direction, -1.5, LEFT)
    assert torch.equal(edited[..., 2:], features[..., 2:])
    torch.testing.assert_close(edited[..., :2], features[..., :2] - 1.5 * direction)
    whole = torch.randn(8, 4, 4)
    torch.testing.assert_close(add(features, whole, 2, EVERYWHERE), features + 2 * whole)


def test_a_part_is_scaled_and_removed(features: torch.Tensor) -> None:
    part, rest = torch.randn(2, 2, 8, 4, 4).unbind()
    torch.testing.assert_close(scale(part + rest, part, 0, EVERYWHERE), rest)
    torch.testing.assert_close(scale(part + rest, part, 3, EVERYWHERE), 3 * part + rest)
    torch.testing.assert_close(scale(part + rest, part, 1, EVERYWHERE), part + rest)
    half = scale(part + rest, part, 0, LEFT)
    torch.testing.assert_close(half[..., 2:], (part + rest)[..., 2:])


def test_a_region_is_pasted_and_mixed(features: torch.Tensor) -> None:
    first, second = features
    pasted = paste(first, second, LEFT)
    torch.testing.assert_close(pasted[..., :2], second[..., :2])
    assert torch.equal(pasted[..., 2:], first[..., 2:])
    torch.testing.assert_close(paste(first, second, LEFT / 2), (first + paste(first, second, LEFT)) / 2)


@pytest.mark.parametrize("path", [lerp, slerp])
def test_paths_begin_and_end_at_the_maps(path: object, features: torch.Tensor) -> None:
    assert callable(path)
    first, second = features
    torch.testing.assert_close(path(first, second, 0.0), first)
    torch.testing.assert_close(path(first, second, 1.0), second)


def test_slerp_keeps_norms_where_the_straight_line_does_not(features: torch.Tensor) -> None:
    first, second = features
    norms = [one.norm(dim=0) for one in (first, second)]
    middle = slerp(first, second, 0.25)
    torch.testing.assert_close(middle.norm(dim=0), 0.75 * norms[0] + 0.25 * norms[1])
    assert (lerp(first, second, 0.25).norm(dim=0) < middle.norm(dim=0)).all()
    # A quarter of the way is a quarter of the angle.
    angle = torch.cosine_similarity(first, second, dim=0).acos()
    torch.testing.assert_close(torch.cosine_similarity(first, middle, dim=0).acos(), angle / 4, atol=1e-3, rtol=0)


def test_slerp_goes_straight_where_there_is_no_way_to_turn() -> None:
    one = torch.ones(3, 1, 1)
    torch.testing.assert_close(slerp(one, 3 * one, 0.5), 2 * one)
    torch.testing.assert_close(slerp(one, -one, 0.25), 0.5 * one)
    torch.testing.assert_close(slerp(torch.zeros(3, 1, 1), one, 0.5), 0.5 * one)


def test_a_box_becomes_shares_of_locations() -> None:
    mask = box_mask((0, 8, 12, 24), (32, 32))
    assert mask.sum() == 12 * 24
    weights = location_weights(mask, (4, 4))
    expected = torch.tensor([1.0, 0.5, 0, 0])[:, None] * torch.tensor([0.0, 1, 1, 1])
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(
    "box", [(0, 0, 33, 8), (-1, 0, 8, 8), (28, 0, 8, 8), (0, 25, 8, 8), (0, 0, 0, 8), (0, 0, 8, -2)]
)
def test_refuses_a_box_outside_the_image(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match=r"`box`: .* is not within the classifier's crop of 32x32 pixels"):
        box_mask(box, (32, 32))


@pytest.mark.parametrize("value", [65536.0, -7e4, torch.inf, torch.nan])
def test_refuses_what_half_precision_cannot_hold(value: float, features: torch.Tensor) -> None:
    refuse_overflow(features.clamp(max=65504), "--strengths")
    features[0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"--strengths: the edited map reaches .*half precision ends at 65504"):
        refuse_overflow(features, "--strengths")
