"""Reconstructions beside their pictures, what they keep of a map at each location, and what it leaves open."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_pl.__main__ import main
from featinv_pl.explore.reconstruct import compare, fidelity
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.types import to_uint8


@pytest.fixture
def pictures() -> list[str]:
    """Pictures of other sizes and modes than the classifier reads, two with the same stem."""
    paths = [Path("a/noise.png"), Path("b/noise.png"), Path("grey.jpg")]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        picture = Image.effect_noise((40 + 10 * number, 50), 60)
        (picture if path.suffix == ".jpg" else picture.convert("RGBA")).save(path)
    return [str(path) for path in paths]


def test_command_writes_pictures_and_a_sheet(
    inverter_folder: Path, pipeline: FeatInvPipeline, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reconstruct", "--model", str(inverter_folder), *pictures, "--num_samples", "2", "--seed", "3", "--out"]
    main([*command, "out"])
    names = {f"{stem}-{number}.png" for stem in ("0-noise", "1-noise", "grey") for number in range(2)}
    assert {path.name for path in Path("out").iterdir()} == names | {"contact_sheet.png", "reconstructions.json"}
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
    assert files[0] == files[1]


def test_command_samples_as_its_options_say(inverter_folder: Path, pictures: list[str]) -> None:
    command = ["reconstruct", "--model", str(inverter_folder), pictures[0], "--num_samples", "1", "--out"]
    for name, *options in (
        ("own",),
        ("half", "--precision", "bf16", "--device", "cpu"),
        ("more", "--sampler.steps", "3"),
    ):
        main([*command, name, *options])
    own, half, more = (np.asarray(Image.open(f"{name}/noise-0.png"), dtype=int) for name in ("own", "half", "more"))
    assert 0 < np.abs(own - half).mean() < 4  # of 255
    [expected] = FeatInvPipeline.from_pretrained(inverter_folder).with_sampler(steps=3)(pictures[0]).images
    assert np.array_equal(more, np.asarray(expected))
    assert not np.array_equal(more, own)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [("bad.png", "'bad.png' cannot be read as a picture"), ("missing.png", "there is no file 'missing.png'")],
)
def test_command_refuses_a_bad_picture_before_it_writes(
    bad: str, reason: str, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.png").write_text("no picture")
    with pytest.raises(SystemExit):
        main(["reconstruct", "--model", "nowhere", *pictures, bad, "--out", "out"])
    assert f"error: IMAGE: {reason}" in capsys.readouterr().err
    assert not Path("out").exists()


def test_cosines_and_spread_are_those_of_each_place() -> None:
    features = torch.ones(2, 2, 1, 3)
    features[:, :, 0, 1] = -1  # the opposite, in both samples
    features[0, 0, 0, 2] = -1  # at a right angle, in one of two
    images = torch.zeros(2, 3, 4, 4)
    images[0, :, 1, 2] = 0.5  # pixels in [0, 1] differ by a quarter
    picture = Image.new("RGB", (8, 8), "black")
    (lost, spread), facts = fidelity(picture, torch.ones(1, 2, 1, 3), images, features)
    assert facts["cosine_by_location"] == [[1.0, -1.0, 0.5]]
    deviation = 0.25 / 2**0.5
    assert facts["pixel_spread"] == pytest.approx({"mean": deviation / 16, "max": deviation}, abs=1e-4)
    assert lost.caption == "bright: lost\ncosine -1.000 to 1.000"
    assert sum(lost.picture.getpixel((4, 4))) > sum(lost.picture.getpixel((0, 4)))  # type: ignore[arg-type]
    assert sum(spread.picture.getpixel((5, 3))) > sum(spread.picture.getpixel((0, 0)))  # type: ignore[arg-type]
    tiles, facts = fidelity(picture, torch.ones(1, 2, 1, 3), images[:1], features[:1])
    assert len(tiles) == 1  # one sample has no spread
    assert "pixel_spread" not in facts


def test_each_model_reconstructs_each_picture(
    pipeline: FeatInvPipeline, opened: tuple[Image.Image, Image.Image]
) -> None:
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
