"""Edits and their controls over sets of pictures: what is measured, compared in pairs, and refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, wilcoxon

from conftest import Pictures
from featinv_pl.__main__ import main
from featinv_pl.explore.concepts import Concepts, difference_concepts, nmf_concepts, pairs_of_labels
from featinv_pl.explore.effects import OTHER, RANDOM, control_parts
from featinv_pl.explore.exploration import read_samples
from featinv_pl.explore.sets import difference
from featinv_pl.explore.steering import steer
from featinv_pl.inverter.pipeline import FeatInvPipeline
from interrupts import Capture


@pytest.fixture(scope="session")
def found(digit_shards: Path) -> Concepts:
    samples = read_samples([digit_shards / "train"], 100, "SHARDS")
    return difference_concepts(samples, pairs_of_labels(samples, [(4, 9), (9, 4), (3, 8)]), pooled=False)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["difference", "nmf"])
def test_controls_are_as_long_as_the_edit(method: str, masked: bool, found: Concepts, digit_shards: Path) -> None:
    samples = read_samples([digit_shards / "train"], 50, "SHARDS")
    features = samples.maps()[3]
    concepts = found if method == "difference" else nmf_concepts(samples, 3)
    edited = found.directions[0] if method == "difference" else concepts.part(features[None], 0)[0]
    weight = torch.ones(4, 4)
    weight[:2] = 0.0 if masked else 1.0
    parts = control_parts(concepts, 0, features, edited, weight, seed=0)
    [random, other] = parts
    assert random == RANDOM
    torch.testing.assert_close(parts[random].norm(dim=0), edited.norm(dim=0))  # at each location
    torch.testing.assert_close((weight * parts[other]).norm(), (weight * edited).norm())
    assert torch.cosine_similarity(parts[random].flatten(), edited.flatten(), dim=0).abs() < 0.5
    if method == "difference":  # not the same direction backwards
        assert other == f"{OTHER}: 3-8"
        again = [control_parts(concepts, 0, features, edited, weight, seed)[RANDOM] for seed in (0, 1)]
        assert torch.equal(again[0], parts[random])
        assert not torch.equal(again[1], parts[random])


def test_effects_are_of_the_images(pipeline: FeatInvPipeline, found: Concepts, opened: Pictures) -> None:
    steered = steer(pipeline, opened[0], found, 0, [0.0, 30.0], classes=[9], num_samples=2)
    everywhere = torch.ones(4, 4)
    original = pipeline.classify(pipeline.crop([opened[0]]))
    kept = sorted({int(original["logits"].argmax()), 9})
    plain = found.score(steered.found["features"][0], everywhere)
    for name, arm in {"edit": steered.found, **steered.controls}.items():
        seen = {"images": arm["images"][1], "features": arm["features"][1], "logits": arm["logits"][1]}
        scores = found.score(seen["features"], everywhere)
        measured = {measure: values[1] for measure, values in steered.effects[name].items()}
        torch.testing.assert_close(measured["score"], scores[:, 0])
        torch.testing.assert_close(measured["other concepts"], (scores - plain)[:, 1:].abs().mean(1))
        shares = seen["logits"].softmax(1)
        torch.testing.assert_close(measured["other classes"], 1 - shares[:, kept].sum(1))
        assert measured["classified"].tolist() == (seen["logits"].argmax(1) == 9).float().tolist()
        far = ((seen["images"] - original["images"]) / 2).square().mean((1, 2, 3)).sqrt()
        torch.testing.assert_close(measured["distance"], far)
        assert measured["reached"].tolist() == (scores[:, 0] - plain[:, 0] >= 15).float().tolist()  # half of 30
        # Strength 0 is the map as it is, whatever the direction.
        assert torch.equal(arm["images"][0], steered.plain["images"])
    alone = steer(pipeline, opened[0], found, 0, [30.0], num_samples=2, controls=False)
    assert not alone.controls
    difference = alone.found["images"][0] - steered.found["images"][1]
    assert difference.abs().max() <= 2.01 / 255  # another batch


def test_paired_tests_are_those_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    one, noise = rng.normal(size=(2, 30))
    keys = [str(number) for number in range(30)]
    far, near = difference(keys, one + 1 + 0.1 * noise, one, False), difference(keys, one + noise, one, False)
    assert far.estimate.values[0] == pytest.approx(1 + 0.1 * noise.mean())
    assert far.p < 0.001
    assert near.p == pytest.approx(wilcoxon(noise).pvalue, abs=0.15)
    mine, other = np.array([1.0] * 12 + [0] * 18), np.array([0.0] * 11 + [1] * 2 + [0] * 17)
    shares = difference(keys, mine, other, True)
    assert shares.estimate.values[0] == pytest.approx(10 / 30)
    assert shares.p == pytest.approx(binomtest(11, 12).pvalue, abs=0.01)  # McNemar's exact test


@pytest.fixture
def model(inverter_folder: Path, found: Concepts) -> list[str]:
    found.save(Path("found"))
    return ["--model", str(inverter_folder), "--out", "out"]


def test_steer_over_a_set_is_steering_each(
    model: list[str], pipeline: FeatInvPipeline, found: Concepts, digit_shards: Path, capsys: Capture
) -> None:
    shards = str(digit_shards / "train")
    chosen = ["--concepts", "found", "--concept", "4-9", "--strengths", "0,20", "--class", "9"]
    main(["steer", *model, *chosen, "--over", shards, "--label", "4", "--num_images", "3"])
    facts = json.loads(Path("out/steered.json").read_text())
    samples = read_samples([Path(shards)], 1000, "SHARDS")
    fours = (samples.labels == 4).nonzero().flatten().tolist()
    last = steer(pipeline, samples.picture(fours[-1]), found, 0, [0, 20], classes=[9], seed=2)
    assert (facts["n"], len(facts["pictures"])) == (3, 3)
    steps = facts["pictures"][samples.keys[fours[-1]]]
    for arm, measures in last.effects.items():
        for measure, values in measures.items():
            expected = values[:, 0].tolist()
            near = pytest.approx(expected, abs=0.02 * max(1, *map(abs, expected)))
            assert steps[arm.partition(":")[0]][measure] == near
    scores = [one["edit"]["score"][1] for one in facts["pictures"].values()]
    assert facts["edits"]["edit"]["score"][1]["value"] == pytest.approx(np.mean(scores))
    against = [one["random direction"]["score"][1] for one in facts["pictures"].values()]
    test = facts["tests"]["score"]["random direction"]
    assert test["value"] == pytest.approx(np.mean(scores) - np.mean(against))
    assert test["low"] <= test["value"] <= test["high"]
    assert "The feature maps of 3 pictures were edited" in capsys.readouterr().out
    page = Path("out/steered.html").read_text()
    assert (page.count("data:image/png"), page.count("data:image/svg+xml")) == (3 * 5, 6)


def test_interpolate_over_a_set(model: list[str], digit_shards: Path, classifier_folder: Path) -> None:
    shards = str(digit_shards / "train")
    over = ["--over", shards, "--real", shards, "--steps", "3", "--num_images", "4", "--num_real", "20"]
    main(["interpolate", *model, *over, "--judge", str(classifier_folder)])
    facts: Any = json.loads(Path("out/interpolated.json").read_text())
    assert (facts["n"], facts["shares"]) == (2, [0, 0.5, 1])
    steps = {path: np.array([one[path] for one in facts["pairs"].values()]) for path in facts["steps"]}
    assert steps["pixels"][:, [0, 2]].min() > steps["features"][:, [0, 2]].max()  # these ends are real images
    lost = steps["features"][:, [0, 2]].mean() - steps["features"][:, 1].mean()
    assert facts["means"]["lost from the ends to the middle"]["features"]["value"] == pytest.approx(lost)
    apart = (steps["features"] - steps["pixels"])[:, 1].mean()
    assert facts["tests"]["in the middle"]["pixels"]["value"] == pytest.approx(apart)
    page = Path("out/interpolated.html").read_text()
    assert (page.count("data:image/png"), page.count("data:image/svg+xml")) == (2 * 3 * 3, 1)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("steer --concepts found", "IMAGE: 0 given. Give 1, or --over FOLDER"),
        ("steer --concepts found a.png --over a", "IMAGE: 1 given besides --over. Give 1, or --over FOLDER"),
        ("steer --concepts found --over a --mask a.png", "--mask is of the size of one picture"),
        ("steer --concepts found --over a --label cat", "--label: 'a' has no class folder 'cat'"),
        ("steer --concepts found --over a --label one", "--over: intervals and tests need 2 pictures, and there is 1"),
        ("steer --concepts found --over empty", "--over: "),
        ("interpolate --over a", "--over compares steps with real images. Give --real"),
        ("interpolate a.png a.png --judge a", "--judge compares steps with real images. Give --real"),
    ],
)
def test_commands_refuse(command: str, message: str, model: list[str], capsys: Capture) -> None:
    for folder in ("a/one", "a/two", "empty"):
        Path(folder).mkdir(parents=True)
    for path in ("a.png", "a/one/1.png", "a/two/2.png"):
        Image.new("RGB", (32, 32)).save(path)
    name, *options = command.split()
    with pytest.raises(SystemExit):
        main([name, *model, *options])
    assert re.search(f"featinv-pl: error: {message}", capsys.readouterr().err)
    assert not Path("out").exists()
