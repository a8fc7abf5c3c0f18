"""Steering measures what it draws, from the same noise, and refuses what makes no sense."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from conftest import Pictures
from featinv_pl.__main__ import main
from featinv_pl.explore.concepts import Concepts, difference_concepts, nmf_concepts, pairs_of_labels
from featinv_pl.explore.exploration import Samples, read_samples
from featinv_pl.explore.steering import steer
from featinv_pl.inverter.pipeline import FeatInvPipeline
from featinv_pl.types import to_uint8
from interrupts import Capture

EVERYWHERE = torch.ones(4, 4)


@pytest.fixture(scope="session")
def samples(digit_shards: Path) -> Samples:
    return read_samples([digit_shards / "train"], 100, "SHARDS")


@pytest.fixture(scope="session")
def difference(samples: Samples) -> Concepts:
    return difference_concepts(samples, pairs_of_labels(samples, [(4, 9), (3, 8)]), pooled=False)


@pytest.fixture(scope="session")
def parts(samples: Samples) -> Concepts:
    return nmf_concepts(samples, 3)


def test_scores_are_those_of_the_images(pipeline: FeatInvPipeline, difference: Concepts, opened: Pictures) -> None:
    strengths = [-40.0, 0.0, 15.0, 40.0]
    found = steer(pipeline, opened[0], difference, 1, strengths, classes=[7], num_samples=2, seed=5)
    images, logits = found.found["images"], found.found["logits"]
    features = pipeline.classify(pipeline.crop([opened[0]]))["features"]
    for step, strength in enumerate(strengths):
        edited = features[0] + strength * difference.directions[1]
        views = pipeline.classify(pipeline.reconstruct(edited, 2, seed=5))  # the same noise at each
        assert (to_uint8(images[step]).int() - to_uint8(views["images"]).int()).abs().max() <= 1  # in another batch
        torch.testing.assert_close(logits[step], views["logits"], rtol=0, atol=1e-2)
        score = difference.score(views["features"], EVERYWHERE)[:, 1]
        torch.testing.assert_close(found.scores[step], score, rtol=0, atol=1e-2)
    assert not torch.equal(images[0], images[-1])
    assert not torch.equal(images[:, 0], images[:, 1])
    ranks = [spearmanr(strengths, found.scores[:, sample]).statistic for sample in (0, 1)]
    assert found.spearman == pytest.approx(sum(ranks) / 2)
    assert found.classes[0] == 7
    constant = replace(found, strengths=[0.0])
    assert constant.facts()["spearman"] is None
    assert "is not defined" in constant.lead
    facts = found.facts()
    assert facts["steps"][1]["scores"] == found.scores[1].tolist()
    assert facts["steps"][1]["probabilities"]["7"] == logits[1].softmax(-1)[:, 7].tolist()


def test_a_mask_confines_the_edit(pipeline: FeatInvPipeline, parts: Concepts, opened: Pictures) -> None:
    """A mask of everything is no mask; one of a half gives what the half alone would."""
    everything, half = torch.ones(32, 32), torch.zeros(32, 32)
    half[:, :16] = 1
    masks = (None, everything, half)
    found = [steer(pipeline, opened[0], parts, 0, [20.0], mask=mask).found["images"][0] for mask in masks]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    edited = pipeline.classify(pipeline.crop([opened[0]]))["features"][0].clone()
    edited[..., :2] += 20 * parts.directions[0]
    assert torch.equal(pipeline.classify(pipeline.reconstruct(edited))["images"], found[2])


def test_removing_a_part_is_scaling_it_to_0(pipeline: FeatInvPipeline, parts: Concepts, opened: Pictures) -> None:
    removed = steer(pipeline, opened[0], parts, 1, [0.0, 0.5, 1.0], "remove").found["images"][:, 0]
    scaled = steer(pipeline, opened[0], parts, 1, [1.0, 0.5, 0.0], "scale").found["images"][:, 0]
    assert torch.equal(removed, scaled)
    [features] = pipeline.classify(pipeline.crop([opened[0]]))["features"]
    without = features - parts.part(features[None], 1)[0]
    for step, edited in ((0, features), (2, without)):
        assert torch.equal(removed[step], pipeline.classify(pipeline.reconstruct(edited))["images"][0])


# The command


@pytest.fixture
def command(inverter_folder: Path, difference: Concepts, picture: Path) -> list[str]:
    difference.save(Path("found"))
    return ["steer", "--model", str(inverter_folder), str(picture), "--concepts", "found", "--out", "out"]


def test_command_masks(command: list[str], picture: Path) -> None:
    mask = Image.new("L", Image.open(picture).size)
    mask.paste(255, (0, 0, 16, 32))
    mask.save("mask.png")
    for name, where in (("mask", ["--mask", "mask.png"]), ("box", ["--box", "0,0,32,16"])):
        main([*command[:-1], name, "--strengths=30", *where])
    facts = [(Path(name) / "steering.json").read_text() for name in ("mask", "box")]
    assert facts[0] == facts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strengths", "-2:2"], "--strengths: must be FROM:TO:COUNT or values separated by commas"),
        (["--strengths", "0:1:0"], "--strengths: must be at least 1, and is 0"),
        (["--strengths", "much"], "--strengths: must be .* by commas, and is 'much'"),
        (["--out", "found/concepts.json"], "--out: must be a folder, and 'found/concepts.json' is a file"),
        (["--box", "1,2,3"], "--box: must be TOP,LEFT,HEIGHT,WIDTH in pixels, and is '1,2,3'"),
        (["--strengths", "1,1e6"], "--strengths: the edited map reaches .* half precision ends at 65504"),
        (["--box", "0,0,33,2"], "--box: 0,0,33,2 .* is not within the classifier's crop of 32x32 pixels"),
        (["--mask", "small.png"], "--mask: 'small.png' has 3x5 pixels, and '.*' has 32x32"),
        (["--mask", "black.png"], "--mask: 'black.png' is black within the classifier's crop"),
        (["--mask", "none.png"], "--mask: 'none.png' cannot be read as a picture"),
        (["--concept", "7"], "--concept: there is no concept '7'"),
        (["--class", "10"], "--class: there is no class 10; the classifier has 10"),
        (["--edit", "remove"], "--edit: only a component .* remove can act on"),
        (["--concepts", "other"], "--concepts belongs to .*, and the model reads 'test_res"),
    ],
)
def test_command_refuses(
    options: list[str], message: str, command: list[str], difference: Concepts, capsys: Capture
) -> None:
    Image.new("L", (3, 5)).save("small.png")
    Image.new("L", (32, 32)).save("black.png")
    other: Any = {**difference.origin, "layer": "layer3"}
    replace(difference, origin=other).save(Path("other"))
    with pytest.raises(SystemExit):
        main([*command, *options])
    assert re.search(f"^featinv-pl: error: {message}", capsys.readouterr().err, re.MULTILINE)
    assert not Path("out").exists()
