"""Reconstructions beside their pictures, interpolation and composition measure what they show."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import Pictures
from featinv_pl.__main__ import main
from featinv_pl.errors import UserError
from featinv_pl.explore.exploration import box_mask, location_weights, read_samples
from featinv_pl.explore.pairs import compose, interpolate
from featinv_pl.explore.paths import slerp
from featinv_pl.explore.reconstruct import _sheet, compare
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.pages.page import Tile
from featinv_pl.types import to_uint8
from interrupts import Capture


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
    one = torch.ones(3, 1, 1)  # from which there is no way to turn to what lies on its line
    for there, share, middle in ((3 * one, 0.5, 2 * one), (-one, 0.25, 0.5 * one), (0 * one, 0.5, 0.5 * one)):
        torch.testing.assert_close(slerp(one, there, share), middle)


def test_ends_are_the_plain_reconstructions(pipeline: FeatInvPipeline, opened: Pictures) -> None:
    straight, turned = (interpolate(pipeline, *opened, steps=5, mode=mode, seed=3) for mode in ("linear", "slerp"))
    assert straight.shares == [0, 0.25, 0.5, 0.75, 1]
    assert not torch.equal(straight.found["images"][2], turned.found["images"][2])
    for step, picture, end in ((0, opened[0], 0), (-1, opened[1], 1)):
        image, cosine = reconstructed(pipeline, picture, seed=3)
        for found in (straight, turned):
            torch.testing.assert_close(found.found["images"][step, 0], image, atol=2 / 127, rtol=0)
            assert found.cosines[step, end].item() == pytest.approx(cosine, abs=1e-3)


def test_flags_what_is_far_from_all_real_images(
    pipeline: FeatInvPipeline, opened: Pictures, digit_shards: Path
) -> None:
    real = read_samples([digit_shards / "train"], 1000, "--real")
    found = interpolate(pipeline, *opened, steps=3, real=real)
    maps = real.features.float()
    cosines = torch.cosine_similarity(maps[:, None], maps[None], dim=2).mean((2, 3)) - 2 * torch.eye(len(maps))
    low, high = cosines.amax(1).quantile(torch.tensor([0.01, 0.99])).tolist()
    assert found.real == pytest.approx((low, high), abs=1e-4)
    nearest = torch.cosine_similarity(found.found["features"], maps[None], dim=2).mean((2, 3)).amax(1)
    assert found.nearest["features"] == pytest.approx(nearest.flatten().tolist(), abs=1e-4)
    assert found.flags["features"] == [cosine < low for cosine in nearest.flatten().tolist()]
    with pytest.raises(UserError, match=r"`real` belongs to .* layer layer3"):
        interpolate(pipeline, *opened, real=replace(real, origin={**real.origin, "layer": "layer3"}))
    # Real images all alike, among which nothing else belongs.
    alike = replace(real, features=torch.cat([maps[:1]] * 5).half())
    assert interpolate(pipeline, *opened, steps=3, real=alike).flags["features"] == [True] * 3
    for limits, flagged in (((-1.0, 1.0), False), (None, False), ((1.0, 1.0), True)):
        [_, steps, *_] = replace(found, real=limits).sections()
        assert [tile.flagged for tile in steps.rows[0]] == [flagged] * 3


# Composition


def test_a_box_becomes_shares_of_locations() -> None:
    mask = box_mask((0, 8, 12, 24), (32, 32))
    assert mask.sum() == 12 * 24
    expected = torch.tensor([1.0, 0.5, 0, 0])[:, None] * torch.tensor([0.0, 1, 1, 1])
    torch.testing.assert_close(location_weights(mask, torch.empty(8, 4, 4)), expected)


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
    everything = compose(pipeline, *opened, box=(0, 0, 32, 32))
    # But for a grey level: sums are ordered differently in batches of other sizes.
    torch.testing.assert_close(
        everything.found["images"][0, 0], reconstructed(pipeline, opened[1])[0], atol=2.01 / 255, rtol=0
    )
    assert everything.facts()["images"][0]["outside"] == {"composed": None, "first": None, "second": None}


@pytest.fixture
def pictures() -> list[str]:
    """Pictures of other sizes and modes than the classifier reads, two with the same stem."""
    paths = [Path("a/noise.png"), Path("b/noise.png"), Path("grey.jpg")]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        picture = Image.effect_noise((40 + 10 * number, 50), 60)
        (picture if path.suffix == ".jpg" else picture.convert("RGBA")).save(path)
    return [str(path) for path in paths]


def test_captions_of_a_sheet_stay_below_their_pictures() -> None:
    """Of letters as wide as they come, and of what fits."""
    black = Image.new("RGB", (64, 64))
    sheet = np.array(_sheet([[Tile(black, f"{letter * 99}\nclass 3")] * 2 for letter in "Wi5"]))
    assert (sheet[:, 192:196] == 255).all()
    assert (sheet[:, -4:].min(axis=(1, 2))[:192] == 0).all()  # the picture
    assert not (sheet[192:210, 170:192] == 255).all()  # the caption is as long as the picture


def test_command_writes_a_sheet(
    inverter_folder: Path, pipeline: FeatInvPipeline, pictures: list[str], capsys: Capture
) -> None:
    command = ["reconstruct", "--model", str(inverter_folder), *pictures, "--num_samples", "2", "--seed", "3", "--out"]
    main([*command, "out"])
    names = {f"{stem}-{number}.png" for stem in ("0-noise", "1-noise", "grey") for number in range(2)}
    assert {path.name for path in Path("out").iterdir()} == names | {
        "contact_sheet.png",
        "reconstructions.html",
        "reconstructions.json",
    }
    assert "6 reconstructions of 3 pictures: mean cosine " in capsys.readouterr().out
    sheet = Image.open("out/contact_sheet.png")
    assert sheet.width == 5 * 192 + 4 * 4  # original, two samples, two heat maps
    assert sheet.height > 3 * 192

    facts = json.loads(Path("out/reconstructions.json").read_text())
    assert [fact["picture"] for fact in facts] == pictures
    original = pipeline.classify(pipeline.crop([Image.open(pictures[2])]))
    reconstructed = pipeline.reconstruct(original["features"][0], num_samples=2, seed=3)
    saved = pipeline.crop([Image.open(f"out/grey-{number}.png") for number in range(2)])
    # Sums are ordered differently in other batches.
    assert (to_uint8(saved).int() - to_uint8(reconstructed).int()).abs().max() <= 1
    cosines = torch.cosine_similarity(pipeline.classify(saved)["features"], original["features"])
    means = [sample["cosine"] for sample in facts[2]["samples"]]
    assert means == pytest.approx(cosines.mean((1, 2)).tolist(), abs=1e-4)
    assert facts[2]["cosine_by_location"] == pytest.approx(np.array(cosines.mean(0).tolist()), abs=1e-4)
    spread = ((saved + 1) / 2).std(0).square().mean(0).sqrt()
    expected = {"mean": spread.mean().item(), "max": spread.max().item()}
    assert facts[2]["pixel_spread"] == pytest.approx(expected, abs=1e-3)

    main([*command, "again"])
    files = [{path.name: path.read_bytes() for path in Path(folder).iterdir()} for folder in ("out", "again")]
    pages = [one.pop("reconstructions.html").decode() for one in files]
    assert files[0] == files[1]
    assert pages[0].replace("--out out", "--out again") == pages[1]  # which name their command


def test_command_samples_as_its_options_say(inverter_folder: Path, pictures: list[str]) -> None:
    command = ["reconstruct", "--model", str(inverter_folder), pictures[0], "--num_samples", "1", "--out"]
    for name, *options in (
        ("own",),
        ("half", "--precision", "bf16", "--device", "cpu"),
        ("more", "--sampler.steps", "3"),
    ):
        main([*command, name, *options])
    own, rounded, more = (np.asarray(Image.open(f"{name}/noise-0.png"), dtype=int) for name in ("own", "half", "more"))
    assert 0 < np.abs(own - rounded).mean() < 4  # of 255
    [expected] = FeatInvPipeline.from_pretrained(inverter_folder).with_sampler(steps=3)(pictures[0]).images
    assert np.array_equal(more, np.asarray(expected))
    assert not np.array_equal(more, own)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [("bad.png", "'bad.png' cannot be read as a picture"), ("missing.png", "there is no file 'missing.png'")],
)
def test_command_refuses_a_bad_picture_before_it_writes(
    bad: str, reason: str, pictures: list[str], capsys: Capture
) -> None:
    Path("bad.png").write_text("no picture")
    with pytest.raises(SystemExit):
        main(["reconstruct", "--model", "nowhere", *pictures, bad, "--out", "out"])
    assert f"error: IMAGE: {reason}" in capsys.readouterr().err
    assert not Path("out").exists()


def test_each_model_reconstructs_each(pipeline: FeatInvPipeline, opened: Pictures) -> None:
    found = compare([("one", pipeline), ("two", pipeline)], ["a", "b"], opened, seed=2)
    before = pipeline.classify(pipeline.crop(opened))
    facts = found.facts()
    assert list(facts) == ["a", "b"]
    for number, name in enumerate(facts):
        features = before["features"][number]
        after = pipeline.classify(pipeline.reconstruct(features, seed=2))
        cosine = torch.cosine_similarity(after["features"], features[None]).mean().item()
        share, likely = before["logits"][number].softmax(0).max(0)
        for model in ("one", "two"):
            drawn = found.models[model][1]["images"][number]
            torch.testing.assert_close(drawn, after["images"], atol=2 / 127, rtol=0)
            assert facts[name][model]["cosine"] == pytest.approx(cosine, abs=1e-3)
            assert len(facts[name][model]["before"]) == len(facts[name][model]["after"]) == 5
            first = next(iter(facts[name][model]["before"].items()))
            assert first == (str(int(likely)), pytest.approx(share.item(), abs=1e-4))
