"""Concepts are found where they are known to be, mean what they say, and survive on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from featinv_pl.__main__ import main
from featinv_pl.data.shards.manifest import read_manifest, write_manifest
from featinv_pl.errors import UserError
from featinv_pl.explore.concepts import (
    Concepts,
    activation_vectors,
    difference_concepts,
    nmf_concepts,
    pair_of_sets,
    pairs_of_labels,
)
from featinv_pl.explore.exploration import Origin, Samples, read_samples
from featinv_pl.explore.gallery import gallery
from interrupts import Capture
from test_cli import refused

ORIGIN = Origin(backbone="tiny", backbone_digest="d" * 64, layer="forward_features", feature_shape=[6, 3, 3])
EVERYWHERE = torch.ones(3, 3)


def samples_of(features: torch.Tensor, labels: torch.Tensor | None = None) -> Samples:
    labels = torch.zeros(len(features), dtype=torch.long) if labels is None else labels
    keys = [f"class {label}/{number}.png" for number, label in enumerate(labels.tolist())]
    return Samples(features.half(), labels, keys, ORIGIN, [])


def two_groups(size: int = 40) -> tuple[Samples, torch.Tensor]:
    """Groups that differ by a known map, within noise."""
    shift = torch.randn(6, 3, 3)
    labels = torch.arange(size) % 2
    return samples_of(0.1 * torch.randn(size, 6, 3, 3) + labels.view(-1, 1, 1, 1) * shift, labels), shift


# Finding


@pytest.mark.parametrize("signed", [False, True])
def test_nmf_finds_the_parts_that_maps_are_made_of(signed: bool) -> None:
    parts = torch.eye(6)[:3] * (torch.tensor([1.0, 1, -1])[:, None] if signed else 1)
    coefficients = torch.rand(50, 3, 3, 3) * (torch.rand(50, 3, 3, 3) > 0.5)
    maps = torch.einsum("bkhw,kc->bchw", coefficients, parts)
    found = nmf_concepts(samples_of(maps), 3)
    assert found.directions.shape == (3, 6, 1, 1)
    assert found.scores["explained"] > 0.99
    similar = torch.cosine_similarity(found.directions.flatten(1)[:, None], parts[None], dim=2)
    order = similar.argmax(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert similar.amax(1).min() > 0.99
    # Each location's coefficients are read back, in units of what one location in a hundred exceeds.
    activations = found.activations(maps)
    assert activations.min() >= 0
    for number, part in enumerate(order.tolist()):
        unit = found.directions[number].norm()
        torch.testing.assert_close(activations[:, number] * unit, coefficients[:, part], atol=0.03, rtol=0)
        assert 0.005 < (activations[:, number] > 1).double().mean() < 0.015
    # What a part contributes is what is missing without it.
    without = maps - found.part(maps, int((order == 0).nonzero()))
    torch.testing.assert_close(without, maps * (parts[0] == 0).view(-1, 1, 1), atol=0.03, rtol=0)


def test_components_do_not_cancel_each_other() -> None:
    """Of a + b and a - b, neither explains what has no b: each is given less than would add up to 2 a."""
    directions = torch.tensor([[1.0, 1], [1, -1]])[..., None, None]
    concepts = Concepts("nmf", ["a+b", "a-b"], directions, torch.zeros_like(directions), {}, ORIGIN)
    activations = concepts.activations(torch.tensor([2.0, 0]).view(1, 2, 1, 1))
    torch.testing.assert_close(activations.flatten(), torch.tensor([2 / 3, 2 / 3]))


def test_difference_goes_from_one_mean_to_the_other() -> None:
    samples, shift = two_groups()
    found = difference_concepts(samples, pairs_of_labels(samples, [(0, 1), (1, 0)]), pooled=False)
    assert found.names == ["0-1", "1-0"]
    torch.testing.assert_close(found.directions[0], shift, atol=0.15, rtol=0)
    torch.testing.assert_close(found.directions[0], -found.directions[1])
    by_folder = difference_concepts(samples, pairs_of_labels(samples, [("class 0", "class 1")]), pooled=False)
    assert torch.equal(by_folder.directions[0], found.directions[0])
    means = [samples.features[samples.labels == label].float().mean(0, keepdim=True) for label in (0, 1)]
    scores = [found.score(mean, EVERYWHERE)[0, 0].item() for mean in means]
    assert scores == pytest.approx([0, 1], abs=1e-4)
    moved = means[0] + 2 * found.directions[0]
    assert found.score(moved, EVERYWHERE)[0, 0].item() == pytest.approx(2, abs=1e-4)
    corner = torch.zeros(3, 3)
    corner[0, 0] = 1
    assert found.score(means[1], corner)[0].tolist() == pytest.approx([1, 0], abs=1e-3)
    pooled = difference_concepts(samples, pairs_of_labels(samples, [(0, 1)]), pooled=True)
    assert pooled.directions.shape == (1, 6, 1, 1)
    torch.testing.assert_close(pooled.directions[0, :, 0, 0], shift.mean((1, 2)), atol=0.1, rtol=0)
    assert found.activations(means[1])[0, 0].mean().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("pooled", [False, True])
def test_activation_vectors_separate_the_groups(pooled: bool) -> None:
    samples, _ = two_groups()
    pairs = pairs_of_labels(samples, [(0, 1)])
    found, difference = activation_vectors(samples, pairs, pooled), difference_concepts(samples, pairs, pooled)
    assert found.scores == {"0-1": 1.0}
    scores = found.score(samples.features.float(), EVERYWHERE)[:, 0]
    assert scores[samples.labels == 0].max() < scores[samples.labels == 1].min()
    noise = samples_of(torch.randn(60, 6, 3, 3), torch.arange(60) % 2)
    assert activation_vectors(noise, pairs_of_labels(noise, [(0, 1)]), pooled).scores["0-1"] < 0.75  # near guessing
    # Strength 1 is the way from one mean to the other, along the vector.
    for label in (0, 1):
        assert scores[samples.labels == label].mean().item() == pytest.approx(label, abs=1e-3)
    assert torch.cosine_similarity(found.directions.flatten(), difference.directions.flatten(), dim=0) > 0.9


def test_refuses_groups_without_a_direction() -> None:
    alike, noise = (
        samples_of(maps, torch.tensor([0, 0, 1])) for maps in (torch.ones(3, 6, 3, 3), torch.randn(3, 6, 3, 3))
    )
    with pytest.raises(UserError, match="'0-1' have the same mean map"):
        difference_concepts(alike, pairs_of_labels(alike, [(0, 1)]), pooled=False)
    with pytest.raises(UserError, match="'0-1' has a group of a single image"):
        activation_vectors(noise, pairs_of_labels(noise, [(0, 1)]), pooled=False)
    with pytest.raises(UserError, match=r"`num_concepts`: 7 components cannot be found .* from 1 to 6"):
        nmf_concepts(noise, 7)


# Examples


def test_examples_are_the_images_that_express_a_concept_most(digit_shards: Path) -> None:
    samples = read_samples([digit_shards / "train"], 1000, "SHARDS")
    found = difference_concepts(samples, pairs_of_labels(samples, [(3, 8)]), pooled=False)
    scores = found.score(samples.features.float(), torch.ones(4, 4))[:, 0]
    [examples] = gallery(found, samples, num_examples=3).examples
    best = scores.argsort(descending=True)[:3].tolist()
    assert [one.score for one in examples] == [scores[index].item() for index in best]
    assert [one.label for one in examples] == samples.labels[best].tolist()
    assert examples[0].picture.tobytes() == samples.picture(best[0]).tobytes()
    assert examples[0].heat.mean().item() == pytest.approx(examples[0].score, rel=1e-3)


def test_samples_are_spaced_over_a_set(digit_shards: Path) -> None:
    everything = read_samples([digit_shards / "train", digit_shards / "clean"], 1000, "SHARDS")
    some = read_samples([digit_shards / "train", digit_shards / "clean"], 5, "SHARDS")
    size = len(everything.places[0][0])
    assert [number for _, number in some.places[:5]] == [round(step * (size - 1) / 4) for step in range(5)]
    assert torch.equal(some.features[4], everything.features[size - 1])
    [(name, first, second)] = pair_of_sets(some)
    assert (name, first.tolist()) == ("train-clean", [True] * 5 + [False] * 5)
    assert torch.equal(second, ~first)


# The command


@pytest.mark.parametrize(
    ("options", "shape", "names"),
    [
        (["--num_concepts", "3"], (3, 8, 1, 1), ["part 0", "part 1", "part 2"]),
        (["--method", "difference", "--between", "4", "9", "--between", "9", "4"], (2, 8, 4, 4), ["4-9", "9-4"]),
        (["--method", "cav", "--pooled", "--between", "4", "9"], (1, 8, 1, 1), ["4-9"]),
        (["clean", "--method", "difference"], (1, 8, 4, 4), ["train-clean"]),
    ],
)
def test_command(options: list[str], shape: tuple[int, ...], names: list[str], digit_shards: Path) -> None:
    sets = [str(digit_shards / name) for name in ("train", *options) if name in ("train", "clean")]
    main(["concepts", *sets, *(one for one in options if one != "clean"), "--out", "found"])
    out = Path("found")
    files = {"concepts.safetensors", "concepts.json", "examples.html", "examples.png", "examples.json"}
    assert {path.name for path in out.iterdir()} == files
    for place in (out, out / "concepts.json", out / "concepts.safetensors"):
        concepts = Concepts.load(place)
        assert (tuple(concepts.directions.shape), concepts.names) == (shape, names)
    assert list(json.loads((out / "examples.json").read_text())) == names
    assert concepts.origin["feature_shape"] == [8, 4, 4]


def test_refuses_sets(digit_shards: Path, capsys: Capture) -> None:
    train, other = digit_shards / "train", Path(shutil.copytree(digit_shards / "clean", "other"))
    manifest, empty = read_manifest(other, "here"), Path(shutil.copytree(other, "empty"))
    write_manifest(empty, {**manifest, "shards": []})
    manifest["provenance"]["layer"] = "layer3"
    write_manifest(other, manifest)
    for options, message in (
        ([], "SHARDS: without --between, two shard sets are compared, and 1 given"),
        (["--between", "3", "11"], "--between: no sample has the label 11. There are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9."),
        (["nothing"], "there is no folder 'nothing'"),
        ([str(other)], "and 'other' those of "),
        ([str(empty)], "SHARDS: the shard set 'empty' has no samples"),
    ):
        refused(["concepts", str(train), *options, "--out", "found", "--method", "difference"], capsys, message)
        assert not Path("found").exists()


# As files


def test_what_is_loaded_is_what_was_saved_and_goes_by_number_or_name() -> None:
    samples, _ = two_groups()
    difference_concepts(samples, pairs_of_labels(samples, [(0, 1)]), pooled=False).save(Path("saved"))
    concepts = Concepts.load(Path("saved"))
    concepts.save(Path("again"))
    for name in ("concepts.json", "concepts.safetensors"):
        assert Path("saved", name).read_bytes() == Path("again", name).read_bytes()
    assert (concepts.method, concepts.origin) == ("difference", ORIGIN)
    assert concepts.number("0") == concepts.number("0-1") == 0
    for unknown in ("1", "1-0", "-1"):
        with pytest.raises(UserError, match=rf"`concept`: there is no concept '{unknown}'. Give one of 0 \(0-1\)"):
            concepts.number(unknown)
